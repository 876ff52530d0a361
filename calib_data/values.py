"""Draws of single strings as documents hold them: words, names, amounts, dates, codes.

Codes leave out characters that many fonts draw alike (I, l, O), for no reader could tell them.
"""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

TEXT = Path(__file__).parent / "text"

_UPPER = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_LOWER = "abcdefghijkmnopqrstuvwxyz"
_DIGITS = "0123456789"
_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNITS = ("kg", "g", "m", "cm", "mm", "km", "l", "ml", "W", "kW", "V", "GB", "MB", "Hz", "h")
_CURRENCIES = ("$", "$", "$", "EUR ", "GBP ", "USD ")
_DOMAINS = ("com", "org", "net", "io", "edu", "eu")
_STREETS = ("Street", "Road", "Lane", "Avenue", "Drive", "Way", "Court")


@cache
def load_list(name: str) -> tuple[str, ...]:
    """Return the lines of a bundled text file."""
    return tuple((TEXT / name).read_text(encoding="ascii").split("\n")[:-1])


def draw_word(rng: random.Random) -> str:
    """Draw a lower-case word."""
    return rng.choice(load_list("words.txt"))


def _cased_word(rng: random.Random) -> str:
    word = draw_word(rng)
    style = rng.random()
    if style < 0.55:
        return word
    return word.capitalize() if style < 0.85 else word.upper()


def _phrase(rng: random.Random) -> str:
    words = [draw_word(rng) for _ in range(rng.choice((1, 2, 2, 3)))]
    return " ".join(words).capitalize()


def draw_number(rng: random.Random) -> str:
    """Draw a number of two to six digits: of single digits too few are held out."""
    value = rng.randrange(10, 10 ** rng.randint(2, 6))
    return f"{value:,}" if rng.random() < 0.3 else str(value)


def _decimal(rng: random.Random) -> str:
    return f"{rng.randrange(10 ** rng.randint(2, 5)) / 100:.{rng.choice((1, 2, 2))}f}"


def _money(rng: random.Random) -> str:
    cents = rng.randrange(100, 10 ** rng.randint(3, 7))
    return f"{rng.choice(_CURRENCIES)}{cents / 100:,.2f}"


def _price(rng: random.Random) -> str:
    return f"{rng.randrange(50, 10 ** rng.randint(3, 5)) / 100:.2f}"


def _percent(rng: random.Random) -> str:
    value = rng.randrange(1, 1000)
    return f"{value / 10:.1f}%" if rng.random() < 0.8 else f"{value}%"


def _date(rng: random.Random) -> str:
    year, month, day = rng.randint(1960, 2039), rng.randint(1, 12), rng.randint(1, 28)
    return rng.choice(
        (
            f"{year}-{month:02d}-{day:02d}",
            f"{day:02d}/{month:02d}/{year}",
            f"{day} {_MONTHS[month - 1]} {year}",
            f"{_MONTHS[month - 1]} {day}, {year}",
            f"{day:02d}.{month:02d}.{year}",
        )
    )


def _time(rng: random.Random) -> str:
    hour, minute = rng.randrange(24), rng.randrange(60)
    if rng.random() < 0.4:
        return f"{hour % 12 or 12}:{minute:02d} {'AM' if hour < 12 else 'PM'}"
    return f"{hour:02d}:{minute:02d}" + (f":{rng.randrange(60):02d}" if rng.random() < 0.4 else "")


def _code(rng: random.Random) -> str:
    """Draw an identifier such as ``KX-40915`` or ``7QF2M9``."""
    style = rng.random()
    digits = "".join(rng.choices(_DIGITS, k=rng.randint(3, 7)))
    letters = "".join(rng.choices(_UPPER, k=rng.randint(1, 4)))
    if style < 0.3:
        return f"{letters}{rng.choice(('-', '-', '/', ' ', ''))}{digits}"
    if style < 0.5:
        return f"{digits}-{''.join(rng.choices(_DIGITS, k=rng.randint(1, 4)))}"
    if style < 0.8:
        return "".join(rng.choices(_UPPER + _DIGITS, k=rng.randint(4, 9)))
    return f"#{digits}" if style < 0.9 else digits


def _phone(rng: random.Random) -> str:
    digits = "".join(rng.choices(_DIGITS, k=10))
    return rng.choice(
        (
            f"({digits[:3]}) {digits[3:6]}-{digits[6:]}",
            f"{digits[:3]}-{digits[3:6]}-{digits[6:]}",
            f"+{digits[:2]} {digits[2:5]} {digits[5:]}",
            f"0{digits[:3]} {digits[3:9]}",
        )
    )


def _person(rng: random.Random) -> str:
    first, last = rng.choice(load_list("first_names.txt")), rng.choice(load_list("last_names.txt"))
    style = rng.random()
    if style < 0.6:
        return f"{first} {last}"
    if style < 0.75:
        return f"{first[0]}. {last}"
    return f"{last}, {first}" if style < 0.85 else f"{first} {rng.choice(_UPPER)}. {last}"


def _first_name(rng: random.Random) -> str:
    return rng.choice(load_list("first_names.txt"))


def _last_name(rng: random.Random) -> str:
    return rng.choice(load_list("last_names.txt"))


def _place(rng: random.Random) -> str:
    return rng.choice(load_list("places.txt"))


def _street(rng: random.Random) -> str:
    name = rng.choice(load_list("last_names.txt"))
    return f"{rng.randint(1, 999)} {name} {rng.choice(_STREETS)}"


def _postcode(rng: random.Random) -> str:
    digits = "".join(rng.choices(_DIGITS, k=5))
    if rng.random() < 0.7:
        return digits
    return f"{''.join(rng.choices(_UPPER, k=2))}{digits[0]} {digits[1]}{rng.choice(_UPPER)}"


def _email(rng: random.Random) -> str:
    user = rng.choice((draw_word(rng), _first_name(rng).lower()))
    tail = str(rng.randrange(100)) if rng.random() < 0.3 else ""
    return f"{user}{tail}@{draw_word(rng)}.{rng.choice(_DOMAINS)}"


def _site(rng: random.Random) -> str:
    return f"www.{draw_word(rng)}.{rng.choice(_DOMAINS)}"


def _amount(rng: random.Random) -> str:
    number = rng.choice((_decimal, draw_number))(rng)
    return f"{number} {rng.choice(_UNITS)}"


def _version(rng: random.Random) -> str:
    return ".".join(str(rng.randrange(20)) for _ in range(rng.choice((2, 3, 3))))


def _words(rng: random.Random) -> str:
    words = [_cased_word(rng) for _ in range(rng.randint(1, 5))]
    if rng.random() < 0.2:
        words[0] += rng.choice(",;:")
    return " ".join(words) + (rng.choice(".!?") if rng.random() < 0.25 else "")


def _scramble(rng: random.Random) -> str:
    """Draw letters that form no word, so that reading cannot be guessing."""
    parts = ["".join(rng.choices(_LOWER, k=rng.randint(3, 8))) for _ in range(rng.randint(1, 3))]
    text = " ".join(parts)
    return text if rng.random() < 0.7 else text.title()


def _misspelt(rng: random.Random) -> str:
    """Draw a name, place or word in which one to three characters are others."""
    text = rng.choice((_place, _place, _person, _first_name, _cased_word, _phrase, _street))(rng)
    chars = list(text)
    for place in rng.sample(range(len(chars)), min(rng.randint(1, 3), len(chars) // 2)):
        letters = _UPPER if chars[place].isupper() else _LOWER
        if chars[place].isalpha():
            chars[place] = rng.choice(letters)
    return "".join(chars)


def _noise(rng: random.Random) -> str:
    """Draw characters of all kinds, a space here and there."""
    chars = rng.choices(_LOWER + _UPPER + 2 * _DIGITS + _MARKS, k=rng.randint(4, 18))
    for place in range(2, len(chars) - 2):
        if rng.random() < 0.12 and chars[place - 1] != " ":
            chars[place] = " "
    return "".join(chars)


def _symbols(rng: random.Random) -> str:
    """Draw words and numbers among punctuation, so that each printable character occurs."""
    first, second = _cased_word(rng), rng.choice((_cased_word, draw_number))(rng)
    mark = rng.choice(("&", "+", "=", "/", "*", "<", ">", "-", "_", "~", "|", "\\", "^"))
    space = rng.choice(("", " "))
    text = f"{first}{space}{mark}{space}{second}"
    style = rng.random()
    if style < 0.35:
        left, right = rng.choice(("()", "[]", "{}", '""', "''", "``", "<>"))
        text = f"{left}{text}{right}"
    return text + rng.choice(("", "", "!", "?", ";", ":", "$", "@", "#", "%"))


def _scrambled(rng: random.Random) -> str:
    """Draw a string that cannot be guessed, whatever of it was read."""
    draws = (_misspelt, _noise, _scramble, _code, _symbols, _email)
    (draw,) = rng.choices(draws, (7, 3, 4, 4, 6, 3))
    text = draw(rng)
    return text + rng.choice(".,;:!?") if rng.random() < 0.15 else text


DRAWS: dict[str, Callable[[random.Random], str]] = {
    "amount": _amount,
    "code": _code,
    "date": _date,
    "decimal": _decimal,
    "email": _email,
    "first_name": _first_name,
    "last_name": _last_name,
    "money": _money,
    "number": draw_number,
    "percent": _percent,
    "person": _person,
    "phone": _phone,
    "phrase": _phrase,
    "place": _place,
    "postcode": _postcode,
    "price": _price,
    "scrambled": _scrambled,
    "site": _site,
    "street": _street,
    "time": _time,
    "version": _version,
    "word": lambda rng: draw_word(rng).capitalize(),
}

_LINE_DRAWS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_words, 36),
    (_code, 12),
    (_scramble, 10),
    (_symbols, 10),
    (_money, 6),
    (_date, 6),
    (draw_number, 5),
    (_decimal, 3),
    (_percent, 3),
    (_email, 4),
    (_person, 5),
    (_phone, 4),
    (_street, 4),
    (_time, 3),
    (_amount, 3),
    (_site, 2),
    (_version, 1),
)
_LINE_KINDS = tuple(draw for draw, _ in _LINE_DRAWS)
_LINE_WEIGHTS = tuple(weight for _, weight in _LINE_DRAWS)


def draw_mixed(rng: random.Random) -> str:
    """Draw a line of any content."""
    (draw,) = rng.choices(_LINE_KINDS, _LINE_WEIGHTS)
    text = draw(rng)
    if rng.random() < 0.15:
        (other,) = rng.choices(_LINE_KINDS, _LINE_WEIGHTS)
        text = f"{text} {other(rng)}"
    return text
