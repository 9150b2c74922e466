"""What needs packages that have left Python 3.10 behind is not collected on it."""

import sys

LEFT_OUT = [
    "minrnn/hf",
    "tests/test_datasets.py",
    "tests/test_hf.py",
    "tests/test_hf_adapters.py",
    "tests/test_hf_checks.py",
    "tests/test_hf_generate.py",
    "tests/test_hf_loss.py",
    "tests/test_hf_tokenizer.py",
    "tests/test_hf_use.py",
]
collect_ignore = LEFT_OUT if sys.version_info < (3, 11) else []
