r"""Splitting "48 dollars", "15\text{ cm}^2" or "90^\circ" into a value and its unit."""

import re

WORDS = "*"
"""Begins a unit that is none of measure, with its words: "* red marble"."""
MAX_WORDS = 5
"""More words behind a number are a sentence."""

_UNITS = {
    name: canonical
    for canonical, names in {
        "mm": "mm millimeter millimetre",
        "cm": "cm centimeter centimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "in": "in inch inche",
        "ft": "ft foot feet",
        "yd": "yd yard",
        "mi": "mi mile",
        "mg": "mg milligram",
        "g": "g gm gram",
        "kg": "kg kilogram",
        "lb": "lb pound",
        "oz": "oz ounce",
        "ml": "ml milliliter millilitre",
        "l": "l liter litre",
        "s": "s sec second",
        "min": "min minute",
        "h": "h hr hour",
        "d": "day",
        "week": "week wk",
        "month": "month",
        "year": "yr year",
        "$": "$ dollar usd buck",
        "€": "€ euro eur",
        "£": "£ gbp",
        "¥": "¥ yen yuan",
        "₹": "₹ rupee",
        "cent": "cent ¢ penny pennie",
        "°": "° degree deg",
        "rad": "rad radian",
        "°c": "°c celsius",
        "°f": "°f fahrenheit",
        "newton": "N newton",
        "joule": "J joule",
        "watt": "W watt",
        "volt": "V volt",
        "mi/h": "mph",
        "km/h": "kph kmh kmph",
        "am": "am a.m",
        "pm": "pm p.m",
        "bc": "bc b.c bce b.c.e",
        "ad": "ad a.d ce c.e",
        WORDS: "st nd rd th unit",
    }.items()
    for name in names.split()
}
_POWERS = {"square": "²", "sq": "²", "squared": "²", "cubic": "³", "cu": "³", "cubed": "³"}
_TIMES = frozenset({"am", "pm", "bc", "ad"})  # units only behind a space, for 2bc is a product
# They change the value before them.
_NO_UNITS = frozenset(
    "or and not nor but except minus plus less more over under than times divided factorial dozen "
    "hundred thousand million billion trillion half halves third thirds fourth fourths fifth fifths quarter "
    "quarters tenth tenths hundredths mod modulo base pi sqrt sin cos tan sec csc cot log ln exp gcd lcm if when "
    "where with for maybe perhaps possibly either to through until remainder choose is are was be".split()
)
_VALUE = re.compile(
    r"(?P<value>.*(?:[0-9]\.?|[})\]!π]|\\pi|\\infty))(?P<unit>(?: *[A-Za-z°¢$€£¥₹][A-Za-z°¢$€£¥₹²³./ \-]*)?)"
)
_CURRENCY = re.compile(r"(?:[$€£¥₹]|Rs\.?|USD|EUR)\s*(?=\S)")
_POWER = re.compile(r"(?<=[A-Za-z.])\s*\^\s*\{?([23])\}?\s*$")
_POWER_OR_SLASH = re.compile("[²³/]")
_DEGREE = re.compile(r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|\\deg)(?![A-Za-z])\s*")


def split_unit(text: str) -> tuple[str, str]:
    r"""The value and the canonical name of its unit: "" for none, `WORDS` and the words for one that is no measure.

    Args:
        text: without font commands: "15 cm^2", not "15\text{ cm}^2".
    """
    text = _POWER.sub(lambda power: {"2": "²", "3": "³"}[power[1]], _DEGREE.sub("°", text)).strip()
    currency = _CURRENCY.match(text)
    if currency:
        sign = _UNITS.get(currency[0].strip().lower(), "₹")  # Rs. is the only one that is no name of a unit
        value, unit = split_unit(text[currency.end() :])
        return value, sign if unit in ("", sign) else f"{WORDS} {sign} {unit}"
    match = _VALUE.fullmatch(text)
    if match is None or not match["unit"]:
        return text, ""
    unit = _canonical(match["unit"])
    return (match["value"].strip(), unit) if unit else (text, "")


def _canonical(unit: str) -> str:
    """Name of a unit, "" if it is none. It touches its value only if it is known: "48cm", but not "2ab" or "2h"."""
    if len(unit) == 1 and unit.isalpha():
        return ""
    parts: list[str] = []
    is_measure = True
    for part in re.split(r"/|\bper\b|\ban\b", unit.replace("-", " ")):
        words = [word.strip(".") for word in part.split()]
        if len(words) > MAX_WORDS or not _NO_UNITS.isdisjoint(map(str.lower, words)):
            return ""
        names = [word for word in words if word.lower() not in _POWERS]
        name = names[0].rstrip("²³") if len(names) == 1 else ""
        known = _known(name)
        changes_value = any(len(word) == 1 for word in names) or words[-1:] in (["squared"], ["cubed"])
        if (not known and changes_value) or ((not known or known in _TIMES) and unit[0].isalpha()):
            return ""
        is_measure &= known not in ("", WORDS)
        power = [_POWERS[word.lower()] for word in words if word.lower() in _POWERS] or re.findall("[²³]", part)
        parts.append(known + "".join(power) if known else " ".join(map(_word, names)))
    return "/".join(parts) if is_measure else f"{WORDS} {' '.join(parts)}"


def _known(name: str) -> str:
    """Canonical name of a measure, "" for another word."""
    return _UNITS.get(name) or _UNITS.get(name.lower()) or _UNITS.get(name.lower().removesuffix("s"), "")


def _word(word: str) -> str:
    return _known(word) or word.lower().removesuffix("s")


def conflict(left: str, right: str) -> bool:
    """Whether two units differ: 5 cm is not 5 km. Of words, one side may say more: 5 marbles may be 5 red marbles."""
    if not left or not right:
        return False
    if WORDS not in left + right:
        return left != right
    fewer, more = sorted((set(_POWER_OR_SLASH.sub(" ", unit).split()) - {WORDS} for unit in (left, right)), key=len)
    return not fewer <= more
