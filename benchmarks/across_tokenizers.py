"""What two tokenizers have in common: strings, and rows on text.

    python benchmarks/across_tokenizers.py qwen3=DIR/tokenizer.json smollm2=DIR/tokenizer.json

Each pair of the named tokenizer.json files is measured in both directions, the first as the teacher's. The
texts are written here: a hundred answers about images, Python and its comments, and Chinese, Japanese and
Korean. Of each pair and kind of text are printed:

- shared: strings that both have, and of how many of the teacher's and the student's tokens these are;
- common: the share of the student's answer tokens (ends of turn included) that both sides predict after the
  same bytes;
- 1:1: the share where the next token has the same bytes on both sides;
- one cell: the share of the common ones whose next tokens are in one cell: these rows are aligned;
- seconds that the map took, and megabytes of the teacher's table of bytes, deflated.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
import zlib
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import cachekd.vocabulary.cells
import cachekd.vocabulary.pair
import cachekd.vocabulary.rows
from cachekd.vocabulary import CellMap, TokenBytes, VocabularyPair

ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>", "<|endoftext|>")

THINGS = ("dog", "tabby cat", "delivery truck", "chess board", "lighthouse", "bowl of noodles", "violinist")
COLOURS = ("red", "turquoise", "dark-green", "off-white", "brownish")
PLACES = (
    "on a wooden table next to a half-empty cup of coffee",
    "in front of a shop whose sign reads “Bäckerei Müller – since 1987”",
    "at the far end of a car park, under three street lamps",
    "in the lower left corner, partly hidden behind a fence",
)
SENTENCES = (
    "The image shows a {colour} {thing} {place}. There are {count} people in the background, and none of "
    "them looks at the camera.",
    "There is a {thing} {place}. It's {colour}, about {count}.5 m long, and it doesn't seem to move; the "
    "weather is overcast (roughly 12°C, I'd say).",
    "1. **Main object**: a {colour} {thing}\n2. **Where**: {place}\n3. **How many**: {count}\n\nOverall, the "
    "scene is calm and well lit.",
    "No. What you see {place} isn't a {thing}: it is a {colour} poster of one, which costs ${count}99.",
    "Yes, the {thing} is {colour}!",
)
CJK = (
    "画像には、木のテーブルの上に置かれた赤い茶碗が{count}個写っています。背景には窓があります。",
    "图片中有{count}只狗坐在沙发旁边，背景是一面白色的墙。天气看起来很好。",
    "사진에는 탁자 옆에 앉아 있는 고양이 {count}마리가 있습니다. 배경에는 창문이 보입니다.",
    "いいえ、これは犬ではなく、青いポスターです（価格は{count}千円）。",
    "是的，招牌上写着“老北京炸酱面”，共有{count}个字。",
)


def texts() -> dict[str, list[str]]:
    """A hundred of each kind, but for code: our own modules' functions."""
    answers, cjk = [], []
    for number in range(100):
        chosen = {
            "thing": THINGS[number % len(THINGS)],
            "colour": COLOURS[number % 3 + number % 2],
            "place": PLACES[number // 5 % len(PLACES)],
            "count": number % 37 + 2,
        }
        answers.append(SENTENCES[number % len(SENTENCES)].format(**chosen))
        cjk.append(CJK[number % len(CJK)].format(count=number % 9 + 2))
    modules = (cachekd.vocabulary.cells, cachekd.vocabulary.pair, cachekd.vocabulary.rows, json.decoder)
    code = [part.strip("\n") for module in modules for part in inspect.getsource(module).split("\n\n\n")]
    return {"answers": answers, "code": code, "cjk": cjk}


def load(path: str) -> tuple[Tokenizer, TokenBytes]:
    """A tokenizer and its table; the end of turn is the first of `ENDS` that it has."""
    tokenizer = Tokenizer.from_file(path)
    ends = [number for name in ENDS if (number := tokenizer.token_to_id(name)) is not None]
    fast: Any = SimpleNamespace(backend_tokenizer=tokenizer, name_or_path=path)
    return tokenizer, TokenBytes.of(fast, ends[0] if ends else None)


def deflated(tokens: TokenBytes) -> int:
    """Bytes of a table of contents and their sizes."""
    sizes = np.array([len(content) for content in tokens.contents], np.uint16)
    return sum(len(zlib.compress(part, 9)) for part in (b"".join(tokens.contents), sizes.tobytes()))


def encoded(tokenizer: Tokenizer, tokens: TokenBytes, text: str) -> list[int]:
    """A text's ids, and the end of turn."""
    end = [] if tokens.end_of_turn is None else [tokens.end_of_turn]
    return [*tokenizer.encode(text, add_special_tokens=False).ids, *end]


def measure(
    teacher: tuple[Tokenizer, TokenBytes], student: tuple[Tokenizer, TokenBytes], kind: str = "cells"
) -> dict[str, Any]:
    """All that is printed of a pair."""
    started = time.perf_counter()
    cells = CellMap.build(teacher[1], student[1], exact=kind == "exact")
    seconds = time.perf_counter() - started
    pair = VocabularyPair(teacher[1], student[1], "exact" if kind == "exact" else "cells", cells)
    found: dict[str, Any] = {
        "shared": cells.shared,
        "of_teacher": cells.shared / len(teacher[1]),
        "of_student": cells.shared / len(student[1]),
        "build_s": seconds,
        "table_mb": deflated(teacher[1]) / 1e6,
    }
    for name, parts in texts().items():
        of_student = common = one_to_one = rows = differ = 0
        for text in parts:
            ids = [encoded(*side, text) for side in (teacher, student)]
            aligned = pair.aligned(*ids)
            of_student += len(ids[1])
            differ += aligned.differs is not None
            common, one_to_one = common + aligned.common, one_to_one + aligned.one_to_one
            rows += sum(len(numbers) for numbers, _ in aligned.rows.values())
        found[name] = {
            "texts": len(parts),
            "differ": differ,
            "student_tokens": of_student,
            "common": common / of_student,
            "one_to_one": one_to_one / of_student,
            "one_cell": rows / max(1, common),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tokenizers", nargs="+", metavar="NAME=PATH", help="tokenizer.json files, two or more"
    )
    parser.add_argument("--exact", action="store_true", help="only strings that both have are in cells")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    loaded = {name: load(path) for name, _, path in (said.partition("=") for said in options.tokenizers)}
    kind = "exact" if options.exact else "cells"
    rows = [
        {"teacher": teacher, "student": student, **measure(loaded[teacher], loaded[student], kind)}
        for teacher, student in permutations(loaded, 2)
    ]
    if options.json:
        print(json.dumps(rows))
        return
    table = Table("pair", "shared, % of V_T / V_S", "text", "common", "1:1", "one cell", "differ", "s", "MB")
    for row in rows:
        for number, name in enumerate(texts()):
            of = row[name]
            shared = f"{row['shared']:,}: {row['of_teacher']:.0%} / {row['of_student']:.0%}"
            shares = (f"{of[part]:.1%}" for part in ("common", "one_to_one", "one_cell"))
            first = not number
            table.add_row(
                f"{row['teacher']} -> {row['student']}" if first else "",
                shared if first else "",
                name,
                *shares,
                f"{of['differ']} of {of['texts']}",
                f"{row['build_s']:.1f}" if first else "",
                f"{row['table_mb']:.2f}" if first else "",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
