"""How the page looks: one style sheet, in the colours of the figures."""

from __future__ import annotations

from megacpp_stp.runs.report_ink import DARK, LIGHT

_SHEET = """
*, ::before, ::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 400 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 2.5rem); }
header { padding-top: 2.5rem; }
h1 { font-size: clamp(1.35rem, 1rem + 1.6vw, 1.9rem); line-height: 1.2; margin: 0 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 2.75rem 0 .6rem; }
h1, h2 { letter-spacing: -.01em; font-weight: 650; overflow-wrap: anywhere; }
p, li, figcaption { overflow-wrap: anywhere; text-wrap: pretty; }
p { margin: 0 0 .75rem; max-width: 46rem; }
header p { max-width: none; }
.kind { color: var(--soft); font-size: .85rem; margin: 0 0 .4rem; }
figcaption, .under, footer { color: var(--soft); }
h1.loud { display: inline-block; background: var(--loud); color: #fff; padding: .35rem .7rem; border-radius: .3rem; }
.invalid { background: var(--loud); color: #fff; padding: .6rem .9rem; border-radius: .3rem; max-width: none; }
.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .9rem; }
.verdict {
  border: 1px solid var(--line); border-left: .3rem solid var(--arm); border-radius: .3rem; padding: .75rem 1rem;
}
.verdict p { margin: 0; font-size: .875rem; color: var(--soft); }
.verdict .what { color: var(--ink); }
.verdict .value {
  font-size: 1.55rem; line-height: 1.35; color: var(--ink); font-weight: 650; font-variant-numeric: tabular-nums;
}
.verdict .value small { font-size: .875rem; font-weight: 400; color: var(--soft); }
ul { margin: .75rem 0; padding-left: 1.1rem; max-width: 46rem; font-size: .9rem; color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .3rem; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; line-height: 1.4; }
th, td { text-align: left; vertical-align: top; padding: .45rem .5rem; border-bottom: 1px solid var(--line); }
tr:last-child > td, tbody:last-child > tr:last-child > th { border-bottom: 0; }
thead th { font-weight: 600; color: var(--soft); vertical-align: bottom; overflow-wrap: break-word; max-width: 20rem; }
thead th, tbody th.group { background: var(--shade); }
tbody th { font-weight: 500; overflow-wrap: break-word; max-width: 20rem; }
tbody th.group { font-weight: 600; color: var(--soft); padding-block: .25rem; }
td { overflow-wrap: break-word; max-width: 24rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th.number { white-space: normal; }
td.short { white-space: nowrap; }
td.wide { min-width: 12rem; }
.arm::before {
  content: ""; display: inline-block; width: .7em; height: .7em; border-radius: .15em; margin-right: .4em;
  background: var(--arm);
}
.arm { white-space: nowrap; font-weight: 600; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
svg.narrow { display: none; }
figcaption, .under { font-size: .875rem; margin-top: .5rem; max-width: 46rem; }
figure + .scroll { margin-top: 1rem; }
footer { font-size: .8rem; margin-top: 3rem; padding-bottom: 3rem; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 40rem) {
  svg.wide { display: none; }
  svg.narrow { display: block; }
  h2 { margin-top: 2.1rem; }
}
@media print {
  body { font-size: 10pt; }
  main, header, footer { max-width: none; padding: 0; }
  figure, .verdict, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7.5pt; }
  th, td { padding: .25rem .35rem; }
  td, td.wide, thead th { min-width: 0; }
  td.short, td.number { white-space: normal; }
  h1.loud, .invalid, .arm::before, .verdict { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  svg.wide { display: block; }
  svg.narrow { display: none; }
}
@page { margin: 15mm; }
"""


def style_sheet() -> str:
    """The sheet, light by itself and dark where a screen asks for it."""
    light = _variables({**LIGHT, "loud": "#b3152a"})
    dark = _variables({**DARK, "loud": "#c2263b"})
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{_SHEET.lstrip()}"
    )


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
