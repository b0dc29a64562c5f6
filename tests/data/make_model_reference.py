"""Makes model_reference.npz: what Hugging Face transformers computes with the checkpoints of reference_models.py.

Needs torch and transformers (made with 2.13.0 and 5.23.0); set LLAMA_HPC_TEST_DATA for the stories models.

    python tests/data/make_model_reference.py                  write the file
    python tests/data/make_model_reference.py --search [CASE]  print a seed for every case (or one)

A greedy token is a fair test only where the two best logits are well apart, so each seed is one for which the smallest
gap in 64 steps exceeds MARGIN of the logit range (the search asks for twice that) and the text is no loop over a few
tokens.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import reference_models as models

STEPS = 64
MARGIN = 2e-3
DISTINCT = 24
CONFIG_VALUES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "rope_parameters",
)  # fmt: skip
# "One day, Tim saw a big red ball in" and "The king lived in a castle", the beginning-of-text token first.
STORIES_PROMPTS = {
    "stories15M": [1, 3118, 2462, 29892, 7870, 4446, 263, 4802, 2654, 8287, 297],
    "stories260K": [1, 291, 409, 299, 397, 396, 322, 261, 280, 412, 356, 305],
}


def load(folder: Path):
    """The model in float32 with eager attention."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    unused = [name for names in info.values() for name in names]
    if unused:
        raise SystemExit(f"{folder}: transformers and the checkpoint disagree about {unused}")
    return model.eval()


def logits_of(model, ids: np.ndarray) -> np.ndarray:
    """Logits [len(ids), V] of one whole text, without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids[None], dtype=torch.int64), use_cache=False).logits[0].numpy()


def greedy(model, prompt: np.ndarray, smallest: float = -1.0) -> tuple[np.ndarray, np.ndarray]:
    """Greedy token ids and relative margins, both [STEPS]; stops early at a margin below ``smallest``."""
    ids, margins = prompt.copy(), []
    for _ in range(STEPS):
        last = logits_of(model, ids)[-1]
        second, first = np.sort(last)[-2:]
        margins.append((first - second) / (last.max() - last.min()))
        if margins[-1] < smallest:
            break
        ids = np.append(ids, np.int32(last.argmax()))
    return ids[len(prompt) :], np.array(margins, np.float32)


def facts(model, sha256: str) -> str:
    """Values that transformers read from config.json, and its rotary scaling, as JSON."""
    config = model.config
    values = {name: getattr(config, name) for name in CONFIG_VALUES}
    values["head_dim"] = model.model.layers[0].self_attn.head_dim
    values["windows"] = [window_of(layer.self_attn, config) for layer in model.model.layers]
    scaling = float(model.model.rotary_emb.attention_scaling)
    return json.dumps({"config": values, "attention_scaling": scaling, "sha256": sha256})


def window_of(attention, config) -> int:
    """Sliding window of a layer; Mistral keeps the one window of all layers in its configuration."""
    mistral = config.sliding_window if config.model_type == "mistral" else None
    return getattr(attention, "sliding_window", mistral) or 0


def values_of(model, prompt: np.ndarray, positions: list[int], sha256: str) -> dict[str, np.ndarray]:
    """The arrays of one `Reference`."""
    ids, margins = greedy(model, prompt)
    whole = logits_of(model, np.concatenate([prompt, ids]))[len(prompt) - 1 : -1].argmax(axis=1)
    if margins.min() < MARGIN or not np.array_equal(whole, ids):
        raise SystemExit(f"smallest margin {margins.min():.2g}: choose another seed")
    print(f"  smallest margin {margins.min():.2e}, {len(set(ids.tolist()))} distinct tokens of {STEPS}")
    return {
        "prompt_ids": prompt,
        "logits_positions": np.array(positions, np.int32),
        "logits": logits_of(model, prompt)[positions],
        "greedy_ids": ids,
        "margins": margins,
        "inverse_frequencies": model.model.rotary_emb.inv_freq.numpy(),
        "facts": np.array(facts(model, sha256)),
    }


def make() -> None:
    """Compute everything and write the file."""
    arrays = {}
    for name in models.CASES:
        print(name)
        with tempfile.TemporaryDirectory() as folder:
            models.write_checkpoint(name, folder)
            prompt, sha256 = models.prompt(name), models.folder_hash(folder)
            positions = [0, 9, 21, 36, *range(len(prompt) - 4, len(prompt))]
            values = values_of(load(Path(folder)), prompt, positions, sha256)
        arrays |= {f"{name}/{key}": value for key, value in values.items()}
    for name in models.STORIES:
        print(name)
        prompt = np.array(STORIES_PROMPTS[name], np.int32)
        values = values_of(load(models.stories_folder(name)), prompt, [len(prompt) - 1], "")
        arrays |= {f"{name}/{key}": value for key, value in values.items()}
    np.savez_compressed(models.REFERENCE_FILE, **arrays)
    print(f"{models.REFERENCE_FILE}: {models.REFERENCE_FILE.stat().st_size} bytes")


def search(name: str, limit: int = 3000) -> None:
    """Print the first seed of a case that satisfies twice MARGIN, and DISTINCT."""
    original = models.case(name)
    for seed in range(1, limit):
        models._CASES[name] = dataclasses.replace(original, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            model = load(models.write_checkpoint(name, folder))
        ids, margins = greedy(model, models.prompt(name), 2 * MARGIN)
        if len(ids) == STEPS and len(set(ids.tolist())) >= DISTINCT:
            print(f"{name}: seed {seed}, margin {margins.min():.2e}, {len(set(ids.tolist()))} tokens", flush=True)
            return
    print(f"{name}: none below {limit}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--search"]:
        for wanted in sys.argv[2:] or models.CASES:
            search(wanted)
    else:
        make()
