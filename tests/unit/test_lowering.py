"""Patterns to Megatron's symbols: what each block becomes, where it lies, and that nothing is lost on the way."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.lowering import lower
from megacpp_stp.recipe import PatternError, load_recipe, parse_pattern

A_LAYERS = (1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49)
DSA_LAYERS = (5, 9, 13, 21, 25, 29, 37, 41, 45)
M_LAYERS = tuple(range(3, 52, 4))
R_LAYERS = (12, 24, 36, 48)
FAMILIES = load_recipe("nam56r").model.families
GQA = load_recipe("nam52").model.families.A


def value_of(argv, option):
    return argv[argv.index(option) + 1]


def test_nam56r_is_what_its_public_description_says():
    """13 A, 22 E, 13 M, 4 R; R at 12 24 36 48; DSA on the A ranks 1 2 3 5 6 7 9 10 11, counted from 0."""
    plan = build_plan(load_recipe("nam56r"))
    layout = plan.layout
    assert {family: layout.source.count(family) for family in "AEMR"} == {"A": 13, "E": 22, "M": 13, "R": 4}
    assert layout.numbers("dsa") == DSA_LAYERS
    assert layout.numbers("mla") == tuple(sorted(set(A_LAYERS) - set(DSA_LAYERS))) == (1, 17, 33, 49)
    assert layout.numbers("mamba3") == M_LAYERS
    assert layout.numbers("m2rnn") == R_LAYERS
    assert layout.megatron_pattern == ("+EMEDEMEDEMM" + "DEME+EMEDEMM" + "DEMEDEME+EMM" + "DEMEDEMEDEMM" + "+EME")
    assert value_of(plan.argv, "--nam-recurrent-layers") == "12,24,36,48"
    assert value_of(plan.argv, "--nam-mamba3-layers") == ",".join(map(str, M_LAYERS))


def test_a_seam_is_named_in_the_table():
    layout = build_plan(load_recipe("nam56r")).layout
    twelfth = layout.layers[11]
    assert (twelfth.number, twelfth.block, twelfth.family, twelfth.symbol) == (12, 12, "R", "M")
    assert twelfth.seam == "m2rnn in a Mamba slot"
    assert layout.layers[2].seam == "mamba3 in a Mamba slot"
    assert layout.seams().keys() == {("M", "mamba3 in a Mamba slot"), ("R", "m2rnn in a Mamba slot")}
    assert layout.stand_ins() == {}


def test_an_attention_block_with_an_mlp_is_two_layers_of_one_block():
    layout = build_plan(load_recipe("nam52")).layout
    assert layout.megatron_pattern == "*-*-M" * 17 + "*-"
    assert [(layer.number, layer.block, layer.kind) for layer in layout.layers[:5]] == [
        (1, 1, "attention"),
        (2, 1, "mlp"),
        (3, 2, "attention"),
        (4, 2, "mlp"),
        (5, 3, "mamba3"),
    ]
    assert len(layout.layers) == 87


def test_depths_of_prediction_are_a_suffix_on_the_last_stage():
    overrides = ["model.mtp={depths: 2, pattern: AE, loss_coeff: 0.1}", "parallel.stages=[52]"]
    plan = build_plan(load_recipe("nam56r", overrides))
    assert plan.layout.megatron_pattern.endswith("+EME/+E/+E")
    assert value_of(plan.argv, "--mtp-num-layers") == "2"
    assert [(layer.number, layer.kind) for layer in plan.layout.mtp] == [(1, "mla"), (2, "moe")]  # never sparse


@pytest.mark.parametrize(("pattern", "position"), [("AMA", 1), ("R", 0), ("AX", 1)])
def test_a_depth_of_prediction_has_no_seam(pattern, position):
    overrides = [f"model.mtp={{depths: 1, pattern: {pattern}, loss_coeff: 0.1}}"]
    with pytest.raises(PatternError) as caught:
        build_plan(load_recipe("nam56r", overrides))
    assert caught.value.position == position
    assert caught.value.field == "model.mtp.pattern"


@pytest.mark.parametrize("ranks", [[13], [3, 2], [1, 1], [0, 13]])
def test_sparse_ranks_are_a_blocks(ranks):
    with pytest.raises(UserError) as caught:
        build_plan(load_recipe("nam56r", [f"model.families.A.sparse.ranks={ranks}"]))
    assert caught.value.field == "model.families.A.sparse.ranks"


def recipe_of(pattern, depth, *, gqa, mtp):
    """NAM56R's families under another pattern; what the pattern lacks is left out."""
    source = str(parse_pattern(pattern, depth=depth))
    ranks = tuple(rank for rank in (1, 2, 3) if rank < source.count("A"))
    attention = GQA if gqa else FAMILIES.A.model_copy(update={"sparse": None})
    if ranks and not gqa:
        attention = FAMILIES.A.model_copy(update={"sparse": FAMILIES.A.sparse.model_copy(update={"ranks": ranks})})
    described = {"A": attention, "M": FAMILIES.M, "E": FAMILIES.E, "R": FAMILIES.R}
    families = FAMILIES.model_copy(update={key: described[key] if key in source else None for key in described})
    recipe = load_recipe("nam56r")
    prediction = None
    if mtp and "A" in source:
        prediction = {"depths": 2, "pattern": "A", "loss_coeff": 0.1}
        prediction = load_recipe("nam56r", [f"model.mtp={prediction}"]).model.mtp
    model = recipe.model.model_copy(
        update={"pattern": pattern, "depth": depth, "families": families, "mtp": prediction}
    )
    return recipe.model_copy(update={"model": model, "stp": None})


@st.composite
def cut_recipes(draw):
    pattern = draw(st.text(alphabet="AEMR", min_size=1, max_size=12))
    depth = draw(st.integers(len(pattern), 40))
    pipeline, virtual = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (3, 2)]))
    segments = pipeline * virtual
    if depth < segments:
        depth = segments + len(pattern)
    inner = st.sampled_from(range(1, depth)) if segments > 1 else st.nothing()
    ends = sorted(draw(st.sets(inner, min_size=segments - 1, max_size=segments - 1)))
    stages = tuple(b - a for a, b in zip([0, *ends], [*ends, depth], strict=True))
    recipe = recipe_of(pattern, depth, gqa=draw(st.booleans()), mtp=draw(st.booleans()))
    parallel = recipe.parallel.model_copy(update={"pipeline": pipeline, "virtual": virtual, "stages": stages})
    return recipe.model_copy(update={"parallel": parallel})


def raised(text):
    """Megatron's symbols back to source letters, as the table would have it."""
    return text.replace("*-", "A").replace("+", "A").replace("D", "A")


@settings(max_examples=300, deadline=None)
@given(cut_recipes())
def test_lowering_can_be_turned_back_and_no_cut_loses_a_layer(recipe):
    layout = lower(recipe, stages=recipe.parallel.stages)
    source = str(parse_pattern(recipe.model.pattern, depth=recipe.model.depth))
    assert layout.source == source
    # Nothing lost, nothing doubled, in order, whatever the cut.
    flat = [layer for segment in layout.segments for layer in segment]
    assert flat == list(layout.layers)
    assert [layer.number for layer in flat] == list(range(1, len(flat) + 1))
    on_ranks = sorted(layer.number for rank in range(layout.pipeline) for layer in layout.rank_layers(rank))
    assert on_ranks == list(range(1, len(flat) + 1))
    # The table leads back to the source: each block in order, all of it on one segment.
    blocks = {layer.block: layer.family for layer in flat}
    assert "".join(blocks[number] for number in sorted(blocks)) == source
    assert all(len({layer.segment for layer in flat if layer.block == number}) == 1 for number in blocks)
    counts = [len({layer.block for layer in segment}) for segment in layout.segments]
    assert tuple(counts) == recipe.parallel.stages
    # And so does the pattern alone, but for R, which shares the Mamba slot and is told apart by its numbers.
    main, *depths = layout.megatron_pattern.split("/")
    assert main.count("|") == len(recipe.parallel.stages) - 1
    assert raised(main.replace("|", "")) == source.replace("R", "M")
    assert set(layout.numbers("m2rnn")) == {layer.number for layer in flat if layer.family == "R"}
    assert len(depths) == layout.mtp_depths
    assert len(set(depths)) <= 1


@settings(max_examples=50, deadline=None)
@given(cut_recipes())
def test_megatron_reads_the_pattern_as_it_was_meant(recipe):
    """Upstream's own parser and segment selection, on the pattern that we wrote."""
    allocation = pytest.importorskip("megatron.core.models.hybrid.hybrid_layer_allocation")
    layout = lower(recipe, stages=recipe.parallel.stages)
    parsed = allocation.parse_hybrid_pattern(layout.megatron_pattern)
    assert parsed.mtp_num_depths == layout.mtp_depths
    assert (parsed.mtp_pattern or "") == "".join(layer.symbol for layer in layout.mtp)
    symbols = parsed.main_pattern.split("|")
    assert symbols == ["".join(layer.symbol for layer in segment) for segment in layout.segments]
    assert allocation.get_hybrid_total_layer_count(layout.megatron_pattern) == len(layout.layers)
