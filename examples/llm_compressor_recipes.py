"""Quantize or prune a model with llm-compressor on a calibration set that the model wrote.

    calprune calibrate MODEL --out calibration
    LLM_COMPRESSOR/bin/python examples/llm_compressor_recipes.py MODEL calibration gptq OUTPUT

Run it with the Python of an environment with llm-compressor. It imports nothing of calprune.
"""

import argparse

import datasets
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ["Linear"]
IGNORE = ["re:.*lm_head"]  # the plain name `lm_head` would not match

W4A16 = QuantizationScheme(
    targets=TARGETS,
    # The preset `W4A16` has groups of 128, which must divide the widths of the layers.
    weights=QuantizationArgs(num_bits=4, strategy="group", group_size=64),
)


def quantize_or_prune(model_folder: str, calibration: str, recipe: str, output: str) -> None:
    """Write the checkpoint that a recipe makes of a model.

    Args:
        model_folder: the model and its tokenizer.
        calibration: data set folder whose column `input_ids` holds the tokens as this model wrote
            them.
        recipe: `gptq`, weights of 4 bits, or `wanda`, half of the weights zero.
        output: a new folder.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    samples = datasets.load_dataset(calibration, split="train").select_columns(["input_ids"])
    modifier = (
        GPTQModifier(config_groups={"W4A16": W4A16}, ignore=IGNORE)
        if recipe == "gptq"
        else WandaPruningModifier(sparsity=0.5, targets=TARGETS, ignore=IGNORE)
    )
    oneshot(
        model=model,
        dataset=samples,
        recipe=modifier,
        num_calibration_samples=len(samples),
        shuffle_calibration_samples=False,  # the order would come from no seed
    )
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(output)
    tokens = sum(len(ids) for ids in samples["input_ids"])
    print(f"{output}: {recipe} on {len(samples)} texts of {tokens} tokens in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("calibration", help="folder that `calprune calibrate` wrote")
    parser.add_argument("recipe", choices=("gptq", "wanda"))
    parser.add_argument("output", help="new folder for the checkpoint")
    asked = parser.parse_args()
    quantize_or_prune(asked.model, asked.calibration, asked.recipe, asked.output)
