"""What is built on transformers is not collected on Python 3.10, which it has left behind."""

import sys

LEFT_OUT = ["minrnn/hf", "tests/test_hf.py", "tests/test_hf_tokenizer.py", "tests/test_hf_use.py"]
collect_ignore = LEFT_OUT if sys.version_info < (3, 11) else []
