r"""LaTeX that math-verify reads, of what people write: pi/4, 2^10, 1.6e-19, 3 1/2, 1 000, x ≥ 5."""

import re

from dapo_megatron.grading.notation import BRACED_COMMA, GROUPED, MATH_SIGN, SPACE

_SYMBOLS = str.maketrans(
    {
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": r"\div ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\neq ",
        "≈": r"\approx ",
        "～": r"\approx ",
        "±": r"\pm ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "π": r"\pi ",
        "θ": r"\theta ",
        "√": r"\sqrt ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "⁄": "/",
        "−": "-",
        "–": "-",
        "（": "(",
        "）": ")",
        "，": ",",
    }
)
_NAMES = re.compile(
    r"(?<![\\A-Za-z])(pi|theta|alpha|beta|gamma|lambda|phi|omega|infinity|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|"
    r"log|ln|exp|sqrt)(?![A-Za-z])"
)
_SQRT = re.compile(r"\\?sqrt\s*\(([^()]*)\)")
_SCIENTIFIC = re.compile(r"(?<=[0-9.])\s*(?:[eE]|[x*]\s*10\s*(?:\^|\*\*)\s*)\{?\s*([-+]?[0-9]+)\s*\}?(?![0-9.A-Za-z])")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*([-+]?[0-9]+)")
_THOUSANDS = re.compile(r"(?<![0-9.,])([1-9][0-9]{0,2})((?: [0-9]{3})+)(?![0-9])")
_MIXED = re.compile(r"(?<![0-9.)])([0-9]+) ([0-9]+)/([0-9]+)(?![0-9/])")
_NUMBERS = re.compile(r"[-+]?[0-9.]+(?: [-+]?[0-9.]+)+")
_PRIME = re.compile(r"(?<![\\A-Za-z])([A-Za-z])\s*((?:'|′|\^\s*\{?\s*\\prime\s*\}?)+)")
# Runs of letters that are names and no products: words, and capitals such as those of a segment or of coins.
_KEPT_OR_NAME = re.compile(
    r"(\\(?:begin|end|text\w*|math\w+|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+)|((?!sqrt)[A-Za-z]{4,}|[A-Z]{2,})"
)


def to_latex(text: str) -> str:
    r"""The answer with symbols, names, exponents and numbers as LaTeX commands; LaTeX stays what it means."""
    text = BRACED_COMMA.sub(",", GROUPED.sub("", text.translate(_SYMBOLS)))
    if text.startswith("~"):
        text = r"\approx " + text[1:]  # elsewhere it is a space
    text = SPACE.sub(" ", MATH_SIGN.sub(" ", text).replace("\\$", "")).strip().rstrip("\\").strip()
    text = _SQRT.sub(r"\\sqrt{\1}", text)
    text = _NAMES.sub(lambda name: "\\" + name[1].replace("infinity", "infty") + " ", text)
    text = _EXPONENT.sub(r"^{\1}", _SCIENTIFIC.sub(r" \\times 10^{\1}", text))
    text = _THOUSANDS.sub(lambda number: number[1] + number[2].replace(" ", ""), text)
    text = _MIXED.sub(r"(\1+\\frac{\2}{\3})", text)
    if _NUMBERS.fullmatch(text):
        text = text.replace(" ", ",")  # side by side, the library would add them
    text = _PRIME.sub(lambda f: rf"\text{{{f[1]}{'prime' * (f[2].count('prime') or len(f[2]))}}}", text)
    return _KEPT_OR_NAME.sub(lambda found: found[1] or rf"\text{{{found[2]}}}", text)
