"""What a drill found, added up over its rounds, and the table of it."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Share:
    """`n` of `of` things."""

    n: int = 0
    of: int = 0

    def add(self, other):
        self.n += other.n
        self.of += other.of

    def __str__(self):
        return f"{self.n:,} of {self.of:,}"


@dataclass
class Spread:
    """Measured numbers of one unit: their median and range."""

    unit: str
    values: list = field(default_factory=list)

    def add(self, other):
        self.values += other.values

    def __str__(self):
        if not self.values:
            return "never"
        low, high = (f"{pick(self.values):,.{self._digits()}f}" for pick in (min, max))
        middle = f"{median(self.values):,.{self._digits()}f} {self.unit}".rstrip()
        return middle if low == high else f"{middle} ({low} to {high})"

    def _digits(self):
        return 0 if not self.unit or max(self.values) >= 20 else 1


@dataclass
class Said:
    """An outcome in words, counted when rounds differ."""

    words: Counter = field(default_factory=Counter)

    def add(self, other):
        self.words += other.words

    def __str__(self):
        if len(self.words) == 1:
            return next(iter(self.words))
        return "; ".join(f"{count} x {word}" for word, count in self.words.most_common())


def said(text):
    """One outcome."""
    return Said(Counter([text]))


@dataclass
class Row:
    """One line of the table: the same measure of each subject."""

    drill: str
    what: str
    cells: dict = field(default_factory=dict)

    def add(self, subject, value):
        if subject in self.cells:
            self.cells[subject].add(value)
        else:
            self.cells[subject] = value


class Table:
    """Rows in the order in which drills first report them."""

    def __init__(self):
        self.rows = {}

    def add(self, drill, subject, measures):
        for what, value in measures.items():
            self.rows.setdefault((drill, what), Row(drill, what)).add(subject, value)

    def markdown(self):
        lines = ["| drill | | Evergate | Gunicorn |", "|---|---|--:|--:|"]
        last = None
        for row in self.rows.values():
            drill = row.drill if row.drill != last else ""
            last = row.drill
            cells = " | ".join(str(row.cells.get(name, "—")) for name in ("Evergate", "Gunicorn"))
            lines.append(f"| {drill} | {row.what} | {cells} |")
        return "\n".join(lines)


@dataclass
class Failures:
    """Failed requests of all sent, and how they ended."""

    ends: Counter = field(default_factory=Counter)
    sent: int = 0

    @classmethod
    def of(cls, load, kind=None):
        return cls(Counter(result.end for result in load.failed(kind)), load.sent(kind))

    def add(self, other):
        self.ends += other.ends
        self.sent += other.sent

    def __str__(self):
        how = ", ".join(f"{count:,} {end}" for end, count in self.ends.most_common())
        return f"{self.ends.total():,} of {self.sent:,}" + (f" ({how})" if how else "")
