"""Makes the files in golden/: what transformers and pyarrow do, for tests that run without them.

python make_golden.py QWEN2.5_TOKENIZER_DIR   (transformers 5.23, pyarrow 26)
"""

import json
import pathlib
import sys

import pyarrow
import pyarrow.parquet
from transformers import AutoTokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"

USERS = [
    "What is 2 + 2?",
    "  Zoë's café costs €1,234.50;\n\nhow much is 10%?\t",
    "{{ 1 + 1 }} {% if x %} <|im_end|> </s> 北京 🙂",
    "",
]


def chat(tokenizer):
    cases = []
    for user in USERS:
        messages = [{"role": "user", "content": user}]
        options = {"tokenize": False, "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(messages, **options)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cases.append({
            "user": user,
            "text": text,
            "ids": ids,
            "decoded": tokenizer.decode(ids, skip_special_tokens=True),
        })
    return cases


def verl_rows():
    """Rows in the form of verl's examples/data_preprocess/gsm8k.py, with questions of our own."""
    problems = [
        ("Ann has 1,000 figs and eats 1. How many are left?", "1000-1=999\n#### 999", "999"),
        ("Ben buys 2 pens at $600 each. What does he pay?", "2*600=1200\n#### 1,200", "1,200"),
        ("Eva walks 3 km north and 5 km back. Where is she?", "3-5=-2\n#### -2", "-2"),
    ]
    for index, (question, answer, truth) in enumerate(problems):
        yield {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": question + " Write the answer after ####."}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"split": "test", "index": index, "answer": answer, "question": question},
        }


def main():
    GOLDEN.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    text = json.dumps(chat(tokenizer), ensure_ascii=False, indent=1)
    (GOLDEN / "qwen2.5_chat.json").write_text(text + "\n")
    rows = list(verl_rows())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), GOLDEN / "verl.parquet")
    plain = [{k: v for k, v in row.items() if k != "extra_info"} for row in rows]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(plain), GOLDEN / "verl_plain.parquet", compression="zstd"
    )


main()
