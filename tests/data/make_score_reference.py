"""Makes score_reference.npz: log-probabilities of texts as Hugging Face transformers computes them, in sliding windows.

Needs torch, transformers and sentencepiece (made with 2.13.0, 5.23.0 and 0.2.3); set LLAMA_HPC_TEST_DATA for the stories models.

Each model has a document of token ids: stories15M has TEXT behind the beginning-of-text token; stories260K, which has no
tokenizer, what it wrote for model_reference.npz; a case of reference_models.py its prompt. For each of WINDOWS there is the
log-probability of every token, NaN where it has none, by the recipe of transformers' page "Perplexity of fixed-length models":
a window scores what the ones before it have not.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import reference_models as models

FILE = Path(__file__).with_name("score_reference.npz")
CASES = ("llama_odd", "mistral_window", "smollm")
WINDOWS = ((32, 32), (32, 12), (24, 1), (64, 32))
TEXT = (
    "Once upon a time there was a little girl called Lily. She had a big red ball, and she loved to play with it in the garden. "
    "One day the ball rolled under a tree. \"Oh no!\" said Lily. \"I can not reach it.\" A small bird came down and asked, "
    "\"Why are you sad?\" Lily told the bird about her ball.\n\nThe bird flew under the tree and pushed the ball out with its "
    "beak. Lily was very happy. She thanked the bird and gave it some bread. From that day on they were good friends.\n"
)


def log_probabilities(model, ids: np.ndarray, window: int, stride: int) -> np.ndarray:
    """float64 [n], NaN where a token has none."""
    found, end_before = np.full(len(ids), np.nan), 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(ids[None, begin:end], dtype=torch.int64), use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits.double(), dim=-1).numpy()
        # The label of a window's first token is lost by the shift.
        for place in range(max(end_before, begin + 1), end):
            found[place] = logprobs[place - begin - 1, ids[place]]
        end_before = end
        if end == len(ids):
            break
    return found


def values_of(name: str, folder: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    scores = {f"{name}/{window}/{stride}": log_probabilities(model, ids, window, stride) for window, stride in WINDOWS}
    return {f"{name}/ids": ids.astype(np.int32)} | scores


def make() -> None:
    """Compute everything and write the file."""
    arrays = {"text": np.array(TEXT)}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            arrays |= values_of(name, models.write_checkpoint(name, folder), models.prompt(name))
    written = models.reference("stories260K")
    arrays |= values_of("stories260K", models.stories_folder("stories260K"),
                        np.concatenate([written.prompt_ids, written.greedy_ids]))
    folder = models.stories_folder("stories15M")
    tokenizer = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    arrays |= values_of("stories15M", folder, np.array([tokenizer.bos_id(), *tokenizer.encode(TEXT)]))
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make()
