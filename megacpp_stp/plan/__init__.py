"""How a recipe is launched: Recipe to RunPlan (argv, environment, layout, digest). Imports no torch."""

from megacpp_stp.plan.build import RunPlan, build_plan
from megacpp_stp.plan.lowering import HybridPlan, Layer, lower

__all__ = ["HybridPlan", "Layer", "RunPlan", "build_plan", "lower"]
