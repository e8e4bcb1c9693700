"""What the configs of language models have in common."""

from mmjax.nn import transformer


class Language:
    """The base of every language model's Config, so that a model's config may hold any of them.

    vocab: ids that are read. blocks: of what reads the prompt, and media in it. tied: the head is the token table.
    answers: whether answers are a stream of their own (an encoder–decoder's).
    The others are as of models.decoder.Config, and what a model without such things says of them.
    """

    vocab: int
    blocks: transformer.Config
    tied: bool
    answers: bool = False
    cross = None
    window = 0
    longest: int | None = None
    embed_scale: float = 1.0

    @property
    def said(self) -> int:
        """Ids that may come next: so many logits there are."""
        return self.vocab
