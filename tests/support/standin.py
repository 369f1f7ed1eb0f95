"""Checkpoints that are gpt-oss in all but size.

`write_published` takes tokenizer, chat template and config from the published files, which lie in
`../shared/gpt-oss/20b` beside the clone; `write_own` does with a tokenizer of bytes and a template
that calls all that the published one calls. Both have YaRN, sinks, sliding windows of 128 tokens
and top-4 routing.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.support import tiny

PUBLISHED = Path(__file__).parents[3] / "shared" / "gpt-oss" / "20b"
TEMPLATE = Path(__file__).parents[1] / "data" / "harmony.jinja"
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "generation_config.json"),
)
MARKS = [
    *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>"),
    *("<|start|>", "<|end|>", "<|message|>", "<|call|>"),
]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
}
CONFIG = Path(__file__).parents[1] / "data" / "gpt-oss-20b" / "config.json"


def config(**changes: Any) -> dict[str, Any]:
    """The published config with fewer and smaller layers, its other settings as they are."""
    found: dict[str, Any] = {**json.loads(CONFIG.read_text()), **SMALL, **changes}
    found["layer_types"] = found["layer_types"][: found["num_hidden_layers"]]
    return found


def write_published(folder: Path) -> Path:
    """The published tokenizer, template and settings, and its vocabulary of 201,088."""
    settings = config()
    tiny.write_checkpoint(folder, settings, tiny.gpt_oss_tensors(settings))
    for name in BESIDE:
        shutil.copy(PUBLISHED / name, folder / name)
    return folder


def write_own(folder: Path) -> Path:
    """A vocabulary of bytes and marks, for clones without the published files."""
    marks = write_tokenizer(folder)
    settings = config(vocab_size=320, eos_token_id=marks["<|return|>"], pad_token_id=None)
    tiny.write_checkpoint(folder, settings, tiny.gpt_oss_tensors(settings))
    write_tokenizer(folder)
    ends = [marks["<|return|>"], marks["<|call|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def write_tokenizer(folder: Path, words: tuple[str, ...] = ()) -> dict[str, int]:
    """Bytes, some words, gpt-oss's marks as special tokens, and the template; gives the marks'
    ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({word: i for i, word in enumerate([*letters, *words])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(MARKS)
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|return|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    return {mark: made.token_to_id(mark) for mark in MARKS}
