"""The error that means: what you gave me is wrong, and here is what to do."""


class InputError(ValueError):
    """Bad input, said in one sentence: what was wrong, where (file, example id, span), what to do.

    Programs print the sentence alone and exit with status 2; a traceback means a bug in mmjax.
    """
