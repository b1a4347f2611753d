"""Short names for corpora of the field and of the testbed, and for perplexity protocols."""

from pipeline.specs import Corpus, HubCorpus, PerplexityProtocol, TestbedCorpus
from pipeline.testbed.world import MISMATCHED_MIXTURE, PRETRAINING_MIXTURE

CORPUS_PRESETS: dict[str, Corpus] = {
    "c4": HubCorpus(path="allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz"),
    "c4-validation": HubCorpus(
        path="allenai/c4", data_files="en/c4-validation.00000-of-00008.json.gz"
    ),
    "wikipedia": HubCorpus(path="wikimedia/wikipedia", name="20231101.en"),
    **{
        f"wikipedia-{language}": HubCorpus(path="wikimedia/wikipedia", name=f"20231101.{language}")
        for language in ("ar", "de", "en", "es", "fr", "hi", "ru", "sw", "zh")
    },
    "slimpajama": HubCorpus(path="DKYoon/SlimPajama-6B"),
    "dclm": HubCorpus(path="mlfoundations/dclm-baseline-1.0-parquet"),
    "wikitext2": HubCorpus(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test"),
    "alpaca": HubCorpus(path="vicgalle/alpaca-gpt4"),
    "testbed-pretraining": TestbedCorpus(mixture=dict(PRETRAINING_MIXTURE)),
    "testbed-heldout": TestbedCorpus(mixture=dict(PRETRAINING_MIXTURE), split="evaluation"),
    "testbed-mismatched": TestbedCorpus(mixture=dict(MISMATCHED_MIXTURE)),
}
"""Name to data set. The `datasets` library reads named files as one split, `train`, so C4's
validation file is read as `train` too."""

PERPLEXITY_PRESETS: dict[str, PerplexityProtocol] = {
    "wanda-wikitext2": PerplexityProtocol(joined_by="\n\n", max_windows=None),
    "wanda-c4": PerplexityProtocol(joined_by=" ", texts=1100, max_windows=256),
    "alpaca-texts": PerplexityProtocol(unit="text", texts=10_000, max_windows=None),
}
"""Name to protocol. SparseGPT, Wanda, DSnoT and OWL use the first two, on WikiText-2's test set and
C4's first validation file; the code of arXiv 2410.17711 uses the third, on Alpaca."""
