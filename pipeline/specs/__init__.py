"""What every stage takes: frozen, validated values whose hash names the artifact they lead to.

They stand apart from the functions that take them, since planning must not wait for torch. A
stage's spec holds the specs of the stages before it, so the lineage of any number is one JSON
document.
"""

from pipeline.specs.base import (
    Fraction,
    Mixture,
    Spec,
    StageSpec,
    canonical_json,
    nearest_stages,
    without_versions,
)
from pipeline.specs.calibration import (
    MIN_K_FRACTION,
    SCORE_BATCH_TOKENS,
    DescribeSpec,
    FilterSpec,
    GenerateSpec,
    ScoreSpec,
    ShardSpec,
    WindowsSpec,
    WordList,
    dropped,
    generator_of,
)
from pipeline.specs.engines import VLLM_LOWEST_TEMPERATURE, Backend, Vllm
from pipeline.specs.evaluation import (
    EvaluateSpec,
    LocalDatasets,
    LocalTasks,
    PerplexityProtocol,
    PerplexitySpec,
    TaskSpec,
    TestbedTasksSpec,
)
from pipeline.specs.pruners import ALPS, RIA, DSnoT, Magnitude, Pruner, PrunerSpec, SparseGPT, Wanda
from pipeline.specs.pruning import (
    OWL,
    Allocation,
    ArithmeticProgression,
    ByHand,
    OutliersSpec,
    PruneSpec,
    Uniform,
    data_taker,
    parse_pattern,
)
from pipeline.specs.sources import (
    Corpus,
    CorpusMixture,
    Dtype,
    FileCorpus,
    HubCorpus,
    HubModel,
    LocalModel,
    Model,
    PretrainSpec,
    TestbedCorpus,
    WeightedCorpus,
    WorldSpec,
)

__all__ = [
    "ALPS",
    "MIN_K_FRACTION",
    "OWL",
    "RIA",
    "SCORE_BATCH_TOKENS",
    "VLLM_LOWEST_TEMPERATURE",
    "Allocation",
    "ArithmeticProgression",
    "Backend",
    "ByHand",
    "Corpus",
    "CorpusMixture",
    "DSnoT",
    "DescribeSpec",
    "Dtype",
    "EvaluateSpec",
    "FileCorpus",
    "FilterSpec",
    "Fraction",
    "GenerateSpec",
    "HubCorpus",
    "HubModel",
    "LocalDatasets",
    "LocalModel",
    "LocalTasks",
    "Magnitude",
    "Mixture",
    "Model",
    "OutliersSpec",
    "PerplexityProtocol",
    "PerplexitySpec",
    "PretrainSpec",
    "PruneSpec",
    "Pruner",
    "PrunerSpec",
    "ScoreSpec",
    "ShardSpec",
    "SparseGPT",
    "Spec",
    "StageSpec",
    "TaskSpec",
    "TestbedCorpus",
    "TestbedTasksSpec",
    "Uniform",
    "Vllm",
    "Wanda",
    "WeightedCorpus",
    "WindowsSpec",
    "WordList",
    "WorldSpec",
    "canonical_json",
    "data_taker",
    "dropped",
    "generator_of",
    "nearest_stages",
    "parse_pattern",
    "without_versions",
]

# A pruned model can stand wherever a model stands, so earlier specs refer forward to PruneSpec.
for _spec in (
    ShardSpec,
    GenerateSpec,
    ScoreSpec,
    FilterSpec,
    WindowsSpec,
    DescribeSpec,
    OutliersSpec,
    PruneSpec,
    EvaluateSpec,
):
    _spec.model_rebuild(_types_namespace=vars())
