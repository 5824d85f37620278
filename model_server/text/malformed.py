"""The one error of text that does not hold what its format promises."""


class MalformedText(ValueError):
    """Generated text is no box list or mask of its dialect, and no repair gives one.

    The message says what was wrong, what the dialect allows, and quotes the beginning of the text.
    """

    def __init__(self, problem: str, text: str) -> None:
        shown = text if len(text) <= 80 else text[:77] + "..."
        super().__init__(f"{problem} The text was {shown!r}.")
