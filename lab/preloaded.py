"""What the server from which trials are forked does last, once: every trial would do it again, for a second each time."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

# Loading any model asks for this table of all architectures, which is built, with its regular expressions, at first use.
get_checkpoint_conversion_mapping("llama")

# A trial's collections pass over what is frozen: they need not walk the imported stack, nor copy its pages.
gc.collect()
gc.freeze()
