"""What the configs of language models have in common."""

from mmjax.nn import transformer


class Language:
    """The base of every language model's Config, so that a model's config may hold any of them.

    vocab: ids. blocks: of what reads the prompt, and media in it. tied: the head is the token table.
    answers: whether answers are a stream of their own (an encoder–decoder's).
    """

    vocab: int
    blocks: transformer.Config
    tied: bool
    answers: bool = False
