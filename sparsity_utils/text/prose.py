"""English prose out of documentation: its paragraphs without code, tables, lists, parameters and licences."""

import ast
import re
import warnings
from collections.abc import Iterator

LEAST_WORDS = 16  # of a paragraph: most summaries of a function are shorter, and lists of them read as no text
PLAIN_WORDS = 0.85  # least share of words without digits, dots or underscores inside
FUNCTION_WORDS = 0.2  # least share; 0.4 is usual in English, 0.1 in a list of names
LICENCE = re.compile(r"(?i)licen[sc]|copyright|redistribut|warrant(y|ies)|all rights reserved|hereby granted|liabilit")

_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)  # of docstrings
_HOLDS_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
_FENCED = re.compile(r"^(```|~~~).*?^\1[`~]*\s*$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^.*\n[=\-~^*#\"'`+_:.]{3,}[ \t]*$|^#+ .*$", re.MULTILINE)
_PLAIN = re.compile(r"[(\"'\u2018\u201c]*[A-Za-z]+(['\u2019/-][A-Za-z]+)*['\u2019\u201d\")]*[.,;:!?]*[\")\u201d]*")
_FUNCTION = re.compile(
    r"(?i)[(\"']*(a|an|and|are|as|at|be|been|but|by|can|do|does|each|for|from|has|have|if|in|into|is|it|its|may|more|must|"
    r"no|not|of|on|only|or|other|should|so|such|than|that|the|their|then|there|these|they|this|to|use|used|was|we|when|"
    r"where|which|will|with|would|you|your)[.,;:!?)\"']*"
)
_MARKUP = (  # in this order: pattern, what stays of it
    (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),  # [text](address)
    (re.compile(r"(?<!\S)\[[\w#-]+\]_"), ""),  # footnote [1]_
    (re.compile(r"(:[\w+-]+)?:[\w+-]+:`(?:[^`<]*<)?[~!.]*([^`>]*)>?`"), r"\2"),  # :class:`~module.Name`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),  # `text <address>`_
    (re.compile(r"\[`+([^`]*)`+\]"), r"\1"),  # [`Name`]
    (re.compile(r"`+([^`]*)`+_*"), r"\1"),
    (re.compile("::$"), ":"),
    (re.compile(r"(?<!\w)(\*{1,2}|_{1,2})(?=\S)(.+?)(?<=\S)\1(?!\w)"), r"\2"),
)


def docstrings(source: str) -> str:
    """The docstrings of a Python file, in the order of the file, dedented, joined by empty lines.

    Empty when there are none or the file does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the text being read are none of the reader's business
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return ""
    owners = [node for node in _statements(tree) if isinstance(node, _OWNERS) and ast.get_docstring(node, clean=False)]
    owners.sort(key=lambda node: node.body[0].lineno)
    return "\n\n".join(filter(None, (_dedented(ast.get_docstring(node, clean=False)) for node in owners)))


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """`tree` and every statement in it; `ast.walk`, which enters expressions too, takes three times as long."""
    left = [tree]
    while left:
        yield (node := left.pop())
        left += [child for child in ast.iter_child_nodes(node) if isinstance(child, _HOLDS_STATEMENTS)]


def _dedented(text: str) -> str:
    """Like `inspect.cleandoc`, which does not give the same text in every Python version."""
    first, *rest = text.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    return "\n".join([first.strip(), *(line[margin:].rstrip() for line in rest)]).strip()


def prose_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of reStructuredText, Markdown or docstrings that are English sentences, each on one line.

    Indented blocks, headings, lists, directives, doctests and tables are left out, and paragraphs on licences; of
    inline markup its words stay.
    """
    text = _HEADING.sub("", _FENCED.sub("", text))
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if re.search(r"^\s", block, re.MULTILINE):  # code, quotes, or the parts of a definition list
            continue
        paragraph = " ".join(block.split())
        for pattern, replacement in _MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        paragraph = " ".join(paragraph.split())
        if _reads_as_english(paragraph):
            yield paragraph


def _reads_as_english(paragraph: str) -> bool:
    words = paragraph.split()
    if (
        len(words) < LEAST_WORDS
        or not re.match(r"[\"'(\u201c]?[A-Z]", paragraph)
        or paragraph[-1] not in '.!?:)"\u201d'
    ):
        return False
    plain = sum(bool(_PLAIN.fullmatch(word)) for word in words)
    function = sum(bool(_FUNCTION.fullmatch(word)) for word in words)
    return (
        plain >= PLAIN_WORDS * len(words) and function >= FUNCTION_WORDS * len(words) and not LICENCE.search(paragraph)
    )
