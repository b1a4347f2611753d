"""Whether calibration data matter to quantizers and to refitted weights as they do to masks."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge self-generated text against the mismatched corpus with each compressor."""
    found = declared_answer(
        results,
        "Perplexity after compression with self-generated text, against the mismatched corpus",
        "Effects of different compressors compare only by what each costs.",
    )
    for panel in found.figure.axes:
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xlabel("change (%), logarithmic beyond ±1 %")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.autoscale(axis="x")
    return found


STUDY = Study(
    "compressors",
    "Do calibration data matter to quantizers and to refitted weights as they do to masks?",
    "self-generated text against the mismatched corpus with each compressor",
    answer,
)
