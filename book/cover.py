"""The cover's drawing and the card for links: `python book/cover.py` makes both anew.

They show a tree of real probabilities (`book/stored.json`): from one beginning the likeliest next tokens,
and what follows each. A branch is as wide as the text up to there is likely. Writes `_static/cover.svg`,
which stands in the first page, and `_static/card.png` (1200 by 630), which other sites show beside a link
to the book.
"""

import html
import json
import math
from pathlib import Path

BOOK = Path(__file__).resolve().parent
WIDTH, HEIGHT = 880, 430
COLUMNS = (10, 270, 490, 710)  # where the tokens of each step begin
FAN = (4, 3, 2)  # branches shown at each step
BEGINNING = "Your parcel will"
GREEN, CREAM, LEAF, AMBER = "#173b2d", "#f7f3e6", "#8fc7a5", "#e9b872"


def tree():
    """The branches: (step, token, probability of the text so far, place above, place below, row)."""
    branches, rows = [], iter(range(1000))

    def grow(node, step, likely):
        places = []
        for i, (token, log) in enumerate(node["tokens"][: FAN[step]]):
            share = likely * math.exp(log)
            following = node.get("next") or []
            inner = grow(following[i], step + 1, share) if step + 1 < len(FAN) and i < len(following) else []
            place = sum(inner) / len(inner) if inner else next(rows)
            places.append(place)
            branches.append({"step": step, "token": token, "share": share, "row": place, "children": inner})
        return places

    beginning = json.loads((BOOK / "stored.json").read_text("utf-8"))["explorer"]["beginnings"][0]
    start = grow(beginning, 0, 1.0)
    count = next(rows)
    for branch in branches:
        branch["y"] = 14 + branch.pop("row") * (HEIGHT - 28) / (count - 1)
        branch["children"] = [14 + row * (HEIGHT - 28) / (count - 1) for row in branch["children"]]
    return branches, [14 + row * (HEIGHT - 28) / (count - 1) for row in start]


def lines():
    """The curves (x, y to x, y, width, colour) and the words (x, y, text, size, strength)."""
    branches, starts = tree()
    root = HEIGHT / 2
    by_place = {(one["step"], round(one["y"], 3)): one for one in branches}
    curves, words = [], []
    for y in starts:
        one = by_place[0, round(y, 3)]
        curves.append((COLUMNS[0], root, COLUMNS[1] - 12, y, one["share"]))
    for one in branches:
        size = 12 + 15 * one["share"] ** 0.5
        words.append((COLUMNS[one["step"] + 1], one["y"], one["token"].strip() or "·", size, one["share"]))
        width = len(one["token"].strip()) * size * 0.53
        for y in one["children"]:
            child = by_place[one["step"] + 1, round(y, 3)]
            begin = COLUMNS[one["step"] + 1] + width + 6
            curves.append((begin, one["y"], COLUMNS[one["step"] + 2] - 12, y, child["share"]))
    words.append((COLUMNS[0], HEIGHT - 14, f"{BEGINNING} …", 15, 0.2))
    return curves, words


def svg():
    curves, words = lines()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'preserveAspectRatio="xMinYMid slice" aria-label="A tree of the likeliest continuations of: '
        'Thank you for your order. Your parcel will. The widest branch goes to: arrive.">'
    ]
    for x1, y1, x2, y2, share in curves:
        middle = (x1 + x2) / 2
        colour = AMBER if share > 0.3 else LEAF
        parts.append(
            f'<path d="M{x1:.0f} {y1:.0f}C{middle:.0f} {y1:.0f} {middle:.0f} {y2:.0f} {x2:.0f} {y2:.0f}" '
            'fill="none" '
            f'stroke="{colour}" stroke-linecap="round" stroke-width="{1 + 13 * share:.1f}" '
            f'opacity="{0.35 + 0.6 * share**0.5:.2f}"/>'
        )
    for x, y, text, size, share in words:
        parts.append(
            f'<text x="{x}" y="{y + size / 3:.0f}" font-size="{size:.0f}" fill="{CREAM}" '
            f'opacity="{0.55 + 0.45 * share**0.3:.2f}">{html.escape(text)}</text>'
        )
    return "".join(parts) + "</svg>\n"


def card(file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    figure = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=GREEN)
    axes = figure.add_axes((0.03, 0.03, 0.97, 0.62))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    curves, words = lines()
    for x1, y1, x2, y2, share in curves:
        middle = (x1 + x2) / 2
        path = Curve([(x1, y1), (middle, y1), (middle, y2), (x2, y2)], [1, 4, 4, 4])
        axes.add_patch(
            PathPatch(
                path,
                fill=False,
                edgecolor=AMBER if share > 0.3 else LEAF,
                linewidth=1 + 12 * share,
                alpha=0.35 + 0.6 * share**0.5,
                capstyle="round",
            )
        )
    for x, y, text, size, share in words:
        strength = 0.55 + 0.45 * share**0.3
        axes.text(x, y, text, fontsize=size * 0.8, color=CREAM, alpha=strength, va="center", family="serif")
    figure.text(0.045, 0.815, "GPT at Work", fontsize=50, color=CREAM, family="serif", weight="bold")
    figure.text(
        0.047, 0.72, "Language models for customer service and sales", fontsize=22, color=LEAF, family="serif"
    )
    figure.savefig(file, facecolor=GREEN, metadata={"Software": None})


if __name__ == "__main__":
    (BOOK / "_static" / "cover.svg").write_text(svg(), encoding="utf-8")
    card(BOOK / "_static" / "card.png")
