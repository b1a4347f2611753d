"""Corpora of the field, and of the testbed, under short names."""

from pipeline.specs import HubCorpus, TestbedCorpus
from pipeline.testbed.world import MISMATCHED_MIXTURE, PRETRAINING_MIXTURE

CORPUS_PRESETS: dict[str, HubCorpus | TestbedCorpus] = {
    "c4": HubCorpus(path="allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz"),
    "c4-validation": HubCorpus(
        path="allenai/c4", data_files="en/c4-validation.00000-of-00008.json.gz"
    ),
    "wikipedia": HubCorpus(path="wikimedia/wikipedia", name="20231101.en"),
    "slimpajama": HubCorpus(path="DKYoon/SlimPajama-6B"),
    "dclm": HubCorpus(path="mlfoundations/dclm-baseline-1.0-parquet"),
    "wikitext2": HubCorpus(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test"),
    "alpaca": HubCorpus(path="vicgalle/alpaca-gpt4"),
    "testbed-pretraining": TestbedCorpus(mixture=dict(PRETRAINING_MIXTURE)),
    "testbed-mismatched": TestbedCorpus(mixture=dict(MISMATCHED_MIXTURE)),
}
"""Name to data set. Files named by hand make up one split, `train`, whatever they hold: so it is in
the `datasets` library, and so C4's validation file is read as `train` too."""
