"""Processors of Hugging Face directories: a tokenizer, a chat template, and what becomes of pictures and videos."""

from mmjax.convert.processor.processor import Processor as Processor
from mmjax.convert.processor.processor import load as load
from mmjax.convert.processor.processor import with_colours as with_colours
