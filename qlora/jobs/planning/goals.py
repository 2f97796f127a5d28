"""The goals of `qlora init`, in the words that it asks with."""

GOALS = {
    "quality": "the best answers that the card allows",
    "speed": "the shortest training",
    "long": "rows as long as the card allows",
    "small": "a small adapter, for many tasks on one base",
}
