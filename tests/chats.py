"""Chat templates in five public styles, each with and without generation marks, and small tokenizers with their tokens."""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "user assistant system model INST a test of sad pets the end <|>/_\n",
    "You are helpful.",
    "What is 2 + 2?\nIt is 4. é",
    "end\n\n\nend\n\n\na",
]


@dataclass(frozen=True)
class Style:
    """`text` has GEN and END where the marks go."""

    text: str
    specials: tuple[str, ...]
    sentencepiece: bool = False
    bos: str | None = None

    @property
    def plain(self) -> str:
        return self.text.replace("GEN", "").replace("END", "")

    @property
    def marked(self) -> str:
        return self.text.replace("GEN", "{% generation %}").replace("END", "{% endgeneration %}")


CHATML = Style(
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}GEN{{ m.content + '<|im_end|>' }}END"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
)
LLAMA3 = Style(
    "{{ bos_token }}{% if strftime_now is defined %}{{ 'Today: ' + strftime_now('%d %b %Y') }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}GEN{{ m.content | trim + '<|eot_id|>' }}END{% else %}{{ m.content | trim + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>",
)
MISTRAL = Style(
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n\n' %}{% elif m.role == 'user' %}"
    "{% if not loop.first and loop.previtem.role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}"
    "{% elif m.role == 'assistant' %}GEN{{ ' ' + m.content | trim + eos_token }}END"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    ("</s>", "<s>", "<unk>"),
    sentencepiece=True,
    bos="<s>",
)
GEMMA = Style(
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if m.role == 'assistant' %}GEN{{ m.content | trim + '<end_of_turn>' }}END"
    "{% else %}{{ m.content | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    sentencepiece=True,
    bos="<bos>",
)
DEEPSEEK = Style(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' }}GEN{{ m.content + '<｜end▁of▁sentence｜>' }}END{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
    ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    bos="<｜begin▁of▁sentence｜>",
)
# Earlier thinking is left out once another question follows, and the last answer gets an empty one.
QWEN3 = Style(
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set words = m.content.split('</think>')[-1].lstrip('\n') %}"
    "GEN{% if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ words + '<|im_end|>' }}END"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
)
STYLES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "deepseek": DEEPSEEK, "qwen3": QWEN3}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The first special token ends a text. It has the unmarked template."""
    style = STYLES[name]
    backend = Tokenizer(models.BPE(byte_fallback=style.sentencepiece, unk_token="<unk>" if style.sentencepiece else None))
    if style.sentencepiece:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [*(set(string.printable) - {" "}), *"é▁"]
    else:
        # Llama 3 keeps line breaks together, whatever follows.
        split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)| ?[^\s]+|\s+"), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "llama3")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if name == "llama3" else byte_level
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=list(style.specials), initial_alphabet=alphabet, show_progress=False
        ),
    )
    names: dict[str, Any] = {"unk_token": "<unk>"} if style.sentencepiece else {}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=style.specials[0], bos_token=style.bos, **names)
    made.chat_template = style.plain
    return made


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    said = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *said] if system is not None else said
