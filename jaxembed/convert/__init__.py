"""Tables and slots from other frameworks and formats, and into them."""

from jaxembed.convert.conversion import convert, open_source
from jaxembed.convert.formats import FORMATS
from jaxembed.convert.interface import ArrayReport, Source
from jaxembed.convert.reporting import ConversionReport

__all__ = ["FORMATS", "ArrayReport", "ConversionReport", "Source", "convert", "open_source"]
