"""The design document's own names, thin over the systems that do the work, and right where the document is not.

docs/unified.md says what stands behind each, and what was mended.
"""

from fekernels.optim import UnifiedOptimizer
from fekernels.unified.demonstrations import (
    benchmark_unified_view,
    show_unified_perspective,
    visualize_train_station,
)
from fekernels.unified.inference import (
    BayesianOptimizer,
    GradientDescentAsVI,
    VariationalFit,
    optimization_as_inference,
)
from fekernels.unified.messages import GradientAsMessagePassing
from fekernels.unified.minimizer import EfficientFreeEnergyMinimizer, FreeEnergyMinimizer
from fekernels.unified.relevance import RelevanceAsUnifiedObjective
from fekernels.unified.train_station import TheTrainStation

__all__ = [
    "BayesianOptimizer",
    "EfficientFreeEnergyMinimizer",
    "FreeEnergyMinimizer",
    "GradientAsMessagePassing",
    "GradientDescentAsVI",
    "RelevanceAsUnifiedObjective",
    "TheTrainStation",
    "UnifiedOptimizer",
    "VariationalFit",
    "benchmark_unified_view",
    "optimization_as_inference",
    "show_unified_perspective",
    "visualize_train_station",
]
