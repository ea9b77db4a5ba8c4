"""Runs the tokenizer service: `python -m nanoinfer_tokenizer --model DIRECTORY`."""

import os
import sys
from collections.abc import Sequence
from functools import partial

from nanoinfer_common.config import parse_settings
from nanoinfer_common.server import serve

from nanoinfer_tokenizer.service import TokenizerService
from nanoinfer_tokenizer.settings import TokenizerSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until told to stop; gives the exit code."""
    # Every call into the `tokenizers` library brings one text, which its own threads cannot share:
    # unasked it would start one for each CPU of the host.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arguments = sys.argv[1:] if argv is None else argv
    settings = parse_settings(TokenizerSettings, arguments, "nanoinfer-tokenizer")
    return serve(partial(TokenizerService, settings), settings)


if __name__ == "__main__":
    sys.exit(main())
