r"""What a response answers, and what needs no computer algebra to compare. Pure, standard library only.

Which candidate counts, in this order (docs/grading.md has the table):

    1. the last closed box behind the last `</think>`      text/boxes.py, which also stops paths
    2. the last `<answer>...</answer>` there               when there is no box
    3. the whole text there                                when there is neither

`settle(truth, answer)` decides choices, words, plain numbers, clock times and dates, and says None for everything
else, which math-verify then decides. A truth may be a JSON list of texts: any of them counts (`accepted`).

All patterns have bounded repetitions or one class at a time, because the text is a model's: time is linear.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from treepo_mega.text.boxes import last_box

MAX_SETTLED = 400
"""Characters of an answer that the rules here look at; what is longer is neither a choice, a word nor a number."""

_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_TAGS = re.compile(r"</?answer>", re.IGNORECASE)
_UNICODE = str.maketrans(
    {"\u2212": "-", "\u00d7": r"\times ", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b0": r"^\circ "}
    | {"\u00b7": r"\cdot ", "\u00b2": "^2", "\u00b3": "^3", "\u00a0": " ", "\u202f": " ", "\u2019": "'"}
)
_PLAIN = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?")
_POWER_OF_TEN = re.compile(r"\\?(?:times|cdot|\*|x)10\^(?:\{([-+]?[0-9]{1,2})\}|([-+]?[0-9]{1,2}))$")
_FRACTION = re.compile(r"([-+]?)(?:\\[dt]?frac\{([-+]?[0-9]+)\}\{([-+]?[0-9]+)\}|([0-9]+)/([0-9]+))")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])([-+]?[0-9]{1,40}(?:\.[0-9]{1,40})?)[eE]([-+]?[0-9]{1,3})(?![\w.])")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s{0,3}\{")
_CUE = re.compile(
    r"\b(?:answer|option|choice)(?:[ \t]{1,3}is)?[ \t]{0,3}[:=]?[ \t*]{0,5}(?P<said>[^\n]{1,80})", re.IGNORECASE
)
_PREFIX = re.compile(
    r"(?:the )?(?:correct |final |best )?(?:answer|option|choice)(?: is)? ?[:=]? ?(?=[(A-Za-z])", re.IGNORECASE
)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):]|([A-Z])(?= [-0-9$\\(]))\s*(.+)", re.DOTALL)
_SECOND_CHOICE = re.compile(r"\([A-Z]\)|(?:\band|\bor|[,&/])\s?\(?[A-Z]\b")
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::[0-9]{2})?\s?([ap]\.?m\.?)?", re.IGNORECASE)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "ln", "lg", "exp", "sqrt")
_MATH_WORDS = frozenset({*_FUNCTIONS, "pi", "infty", "inf", "infinity", "oo", "max", "min", "mod", "gcd"})
_UNITS = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "ft": "foot feet",
    "mi": "mile miles",
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "s": "sec second seconds",
    "min": "minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "mph": "miles/hour mi/h",
    "km/h": "kmh kph km/hr",
    "m/s": "mps",
    "$": "dollar dollars usd",
    "cent": "cents",
}
_UNIT_OF = {alias: unit for unit, aliases in _UNITS.items() for alias in (unit, *aliases.split())}
_MEASURE = re.compile(r"([-+]?[0-9][0-9.,]*)\s?([A-Za-z][A-Za-z/]*)")


@dataclass(frozen=True, slots=True)
class Answer:
    """The candidate that counts, and what marked it."""

    text: str
    mark: Literal["box", "tag", "none"]


def after_thinking(text: str) -> str:
    """What stands behind the last `</think>`; the whole text without one."""
    return text.rpartition("</think>")[2]


def find_answer(response: str) -> Answer:
    r"""The candidate of a response that counts.

    >>> find_answer(r"<think>\boxed{1}</think> <answer>2</answer>")
    Answer(text='2', mark='tag')
    """
    content = last_box(response)
    if content is not None:
        return Answer(content, "box")
    rest = after_thinking(response)
    tagged = [found.strip() for found in _ANSWER_TAG.findall(rest)]
    tagged = [found for found in tagged if found]
    return Answer(tagged[-1], "tag") if tagged else Answer(_TAGS.sub(" ", rest), "none")


def accepted(ground_truth: str) -> list[str]:
    """The answers that count: the texts of a JSON list of texts, else the truth itself.

    >>> accepted('["0.5", "1/2"]'), accepted("[1, 2]")
    (['0.5', '1/2'], ['[1, 2]'])
    """
    # Only a list of texts names alternatives: `[1, 2]` is an interval or a list, an answer by itself.
    if ground_truth.lstrip().startswith('["'):
        try:
            found = json.loads(ground_truth)
        except (ValueError, RecursionError):
            return [ground_truth]
        if isinstance(found, list) and found and all(isinstance(text, str) for text in found):
            return found
    return [ground_truth]


def tidy(text: str) -> str:
    r"""`text` as math-verify reads it best: no dollars, no LaTeX spacing, no trailing period, 1.2e3 as a product.

    >>> tidy(r"\$1{,}200."), tidy("1.2e3")
    ('1,200', '1.2\\times 10^{3}')
    """
    text = text.translate(_UNICODE).strip()
    if "\\begin" not in text:  # in a matrix two backslashes end a row
        text = re.sub(r"\\{2,4}(?=[A-Za-z$%{}()\[\]])", lambda _: "\\", text)
    for spelling, plain in (("{,}", ","), ("\\$", ""), ("$", ""), ("\\(", ""), ("\\)", ""), ("\\[", ""), ("\\]", "")):
        text = text.replace(spelling, plain)
    text = text.replace("\\displaystyle", "").replace("\\!", "").replace("\\;", " ").replace("\\ ", " ")
    # Between digits `\,` groups thousands. That is undone before `\,` becomes a space, as in `3\,m`.
    text = re.sub(r"(?<=[0-9])(?:\\,|~)(?=[0-9]{3})", "", text).replace("\\,", " ").replace("~", " ")
    text = text.strip().strip("`").removeprefix("**").removesuffix("**").strip()
    if text.endswith(".") and not text.endswith("..."):
        text = text[:-1].rstrip()
    if re.fullmatch(r"[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?", text):
        text = text.replace(" ", "")
    return _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)


def plain(text: str) -> str:
    r"""`tidy` text with `\text{...}` and its kin unwrapped and single spaces."""
    text = tidy(text)
    for _ in range(3):
        if not (match := _WRAPPER.search(text)):
            break
        depth = 1
        end = match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            break
        text = f"{text[: match.start()]} {text[match.end() : end - 1]} {text[end:]}"
    return " ".join(text.split()).rstrip(".").strip()


def as_number(text: str) -> Fraction | None:
    r"""The exact number that `text` spells, or None: integer, decimal, 1.2e3, 1.2 \times 10^3, a/b, \frac{a}{b}.

    Thousands commas and dollars are allowed. Nothing is evaluated, and long digit strings and large exponents are
    refused: `text` is a model's.
    """
    if len(text) > 200:
        return None
    short = text.strip().replace("\\$", "").strip("$").translate(_UNICODE).replace("{,}", ",")
    short = short.replace("\\,", "").replace("\\!", "").replace(" ", "").rstrip(".")
    exponent = 0
    if power := _POWER_OF_TEN.search(short):
        exponent = int(power[1] or power[2])
        short = short[: power.start()]
    if re.fullmatch(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", short):
        short = short.replace(",", "")
    if _PLAIN.fullmatch(short):
        return Fraction(short) * Fraction(10) ** exponent
    match = _FRACTION.fullmatch(short)
    if match is None or exponent:
        return None
    sign, latex_top, latex_bottom, plain_top, plain_bottom = match.groups()
    top = int(latex_top or plain_top)
    bottom = int(latex_bottom or plain_bottom)
    return None if bottom == 0 else Fraction(top, bottom) * (-1 if sign == "-" else 1)


def choice(truth: str) -> tuple[str, str] | None:
    r"""(letter, text beside it) when the truth is a choice: `B`, `(B)`, `\text{B}`, `\textbf{(B)}\ 12`; else None."""
    text = plain(truth)
    if (match := _LETTER.fullmatch(text)) and match[1].isupper():
        return match[1], ""
    if (match := _LETTER_AND_TEXT.fullmatch(text)) and not _SECOND_CHOICE.search(match[4]):
        letter = match[1] or match[2] or match[3]
        # "A 5" may be a product of A and 5: without a mark the letter is no choice in a truth.
        return (letter, match[4].strip()) if not match[3] else None
    return None


def chosen(text: str) -> str | None:
    """The one letter that a short answer chooses, with or without text beside it; None without one or with two."""
    text = plain(text)
    text = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
    if match := _LETTER.fullmatch(text):
        return match[1].upper()
    match = _LETTER_AND_TEXT.fullmatch(text)
    if match is None or _SECOND_CHOICE.search(match[4]):
        return None
    return match[1] or match[2] or match[3]


def words(text: str) -> tuple[str, ...] | None:
    """Lower-case words when `text` is made of words, not of variables; None for mathematics.

    Letters alone are a word, not a product of variables, unless all of them are x, y or z.

    >>> words("No solution."), words("xy"), words("CA")
    (('no', 'solution'), None, ('ca',))
    """
    text = plain(text)
    if len(text) > MAX_SETTLED or not all(c.isalpha() or c in " ',.;!?&-" for c in text):
        return None
    found = [run for run in re.split(r"[ ,.;!?&-]+", text.casefold()) if run]
    if not any(len(run) > 1 or not run.isascii() for run in found):
        return None
    if any(run in _MATH_WORDS for run in found) or all(set(run) <= set("xyz") for run in found):
        return None
    if "-" in text and all(len(run) <= 2 for run in found):  # ab-cd is a difference, well-known is a word
        return None
    return tuple(found)


def said(text: str) -> list[str]:
    """What unmarked text may name as its answer: the last `answer is ...` or `answer: ...`, else the last line."""
    cues = [match["said"] for match in _CUE.finditer(text)]
    if cues:
        return [cues[-1], re.split(r"[.;](?:\s|$)", cues[-1])[0]]
    lines = [line for line in text.splitlines() if line.strip()]
    return [lines[-1]] if lines else []


def is_settled(truth: str) -> bool:
    """Whether `settle` can find an answer right for this truth by itself: it is a number, words, a choice or a time."""
    if as_number(truth) is not None or words(truth) is not None or choice(truth) is not None:
        return True
    text = plain(truth)
    return bool(_CLOCK.fullmatch(text) or _DATE.fullmatch(text))


def settle(truth: str, answer: Answer) -> bool | None:
    """Whether `answer` is the one accepted answer `truth`; None when only mathematics can tell."""
    candidates = [answer.text] if answer.mark != "none" else said(answer.text)
    candidates = [text for text in candidates if len(text) <= MAX_SETTLED]
    if (pick := choice(truth)) is not None:
        return _settle_choice(pick, candidates)
    if (wanted := words(truth)) is not None:
        return any(words(text) == wanted for text in candidates)
    if answer.mark == "none" or not candidates:
        return None
    return _settle_marked(truth, answer.text)


def _settle_choice(pick: tuple[str, str], candidates: list[str]) -> bool | None:
    letter, beside = pick
    letters = [found for found in map(chosen, candidates) if found]
    if letters:
        return letters[0] == letter
    if not beside:
        return False
    number = as_number(beside)
    same = any(plain(text).casefold() == plain(beside).casefold() for text in candidates)
    return same or (number is not None and any(as_number(text) == number for text in candidates))


def _settle_marked(truth: str, text: str) -> bool | None:
    wanted = plain(truth)
    given = plain(text)
    squeezed = "".join(wanted.split()).casefold()
    if _DATE.fullmatch(wanted):
        return given == wanted
    if clock := _CLOCK.fullmatch(wanted):
        if "".join(given.split()).casefold().replace(".", "") == squeezed.replace(".", ""):
            return True
        # 10:30 is a time of day, 3:10 may be a ratio: a ratio is written in lowest terms.
        return False if clock[3] or math.gcd(int(clock[1]), int(clock[2])) != 1 else None
    number = as_number(wanted)
    other = as_number(given)
    if number is not None and other is not None:
        return _numbers_agree(number, other, "/" in wanted + given or "frac" in wanted + given)
    # math-verify multiplies the letters of a word, so that silent would equal listen: it is not asked.
    return False if _units_differ(wanted, given) or _is_anagram(wanted, given) else None


def _numbers_agree(truth: Fraction, given: Fraction, a_fraction: bool) -> bool:
    """Decimals agree exactly; a fraction also agrees with its decimal to six places (0.333333 for 1/3)."""
    if truth == given:
        return True
    return a_fraction and abs(truth - given) <= Fraction(1, 10**6) * min(Fraction(1), abs(truth))


def _units_differ(truth: str, given: str) -> bool:
    """Whether both are a number with a known unit, and the units are not the same: 60 mph is not 60 km/h."""
    one = _MEASURE.fullmatch(truth)
    two = _MEASURE.fullmatch(given)
    if one is None or two is None:
        return False
    units = [_UNIT_OF.get(match[2].casefold()) for match in (one, two)]
    return None not in units and units[0] != units[1]


def _is_anagram(truth: str, given: str) -> bool:
    """Whether both hold words of three letters and more, which differ in the order of their letters only."""
    if "\\" in truth + given or not re.search(r"[A-Za-z]{3}", truth) or not re.search(r"[A-Za-z]{3}", given):
        return False
    one = re.findall(r"[A-Za-z]+", truth.casefold())
    two = re.findall(r"[A-Za-z]+", given.casefold())
    known = _MATH_WORDS | set(_UNIT_OF)
    if any(run in known for run in one):
        return False
    return one != two and sorted("".join(one)) == sorted("".join(two))
