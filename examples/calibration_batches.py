"""Make calibration batches for another tool from an exported calibration set.

    python -m jobs export-calibration KEY calibration --store STORE
    python examples/calibration_batches.py calibration TOKENIZER

The folder is an ordinary data set of the `datasets` library, so many tools read it directly. Here
its texts are tokenised for any model, joined with EOS in between, and cut into windows without
padding.
"""

import sys
from collections.abc import Iterator

import datasets
import torch
from transformers import AutoTokenizer


def calibration_batches(
    folder: str, tokenizer_name: str, seqlen: int = 64, batch_size: int = 4
) -> Iterator[torch.Tensor]:
    """Yield token ids `[batch_size, seqlen]`; the last batch may have fewer windows."""
    samples = datasets.load_dataset(folder, split="train")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    ids: list[int] = []
    for text in samples["text"]:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    windows = torch.tensor(ids[: len(ids) // seqlen * seqlen]).view(-1, seqlen)
    yield from windows.split(batch_size)


if __name__ == "__main__":
    for batch in calibration_batches(sys.argv[1], sys.argv[2]):
        print(f"{len(batch)} windows of {batch.shape[1]} tokens")
