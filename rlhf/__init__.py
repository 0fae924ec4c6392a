"""RLHF that one person can run, read and trust: supervised fine-tuning, a reward model, PPO.

Importing this package imports neither torch nor transformers, so that a refusal, a typo or
`rlhf ls` answers at once; each module imports what it needs.
"""

__version__ = "0.1.0"
