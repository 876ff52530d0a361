"""Pages of PDF files, rendered with pypdfium2; the text layer is what they say.

A page that was scanned has no text layer and gives a question without an answer, and so does one
with form fields, whose values are not in that layer. Text is taken in the order the file has it,
which for columns and tables need not be the order a reader would follow.

pypdfium2 comes with the extra ``nvvl[pdf]``.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.calib_data.sources import ItemSource, failing_source, list_files
from nvvl.errors import DataError
from nvvl.model.prompt import Message
from nvvl.model.tiling import MAX_IMAGE_PIXELS, to_rgb

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument, PdfPage

PDF = "pdf"

_POINTS_PER_INCH = 72
# what pdfium writes for a hyphen at the end of a line
_HYPHENS = str.maketrans({"\ufffe": "-", "\x02": "-"})


def pdf_items(path: Path, *, question: str, dpi: int, pages_per_item: int) -> list[ItemSource]:
    """List the pages of a PDF file, or of those below a folder, in groups.

    A file that cannot be opened is one item that cannot be made.

    Args:
        path: File or folder.
        question: What is asked of every group of pages.
        dpi: Resolution of the rendered pages.
        pages_per_item: Consecutive pages of one file in an item; the last has what is left.

    Raises:
        DataError: if there is no such file or folder, no PDF file in it, or no pypdfium2.
    """
    sources = []
    for name, file in list_files(path, (".pdf",), "PDF file").items():
        try:
            with _open(file) as document:
                num_pages = len(document)
            if not num_pages:
                raise DataError(f"{file}: required at least one page, got none")
        except DataError as error:
            sources.append(failing_source(name, error))
            continue
        for start in range(0, num_pages, pages_per_item):
            pages = range(start, min(start + pages_per_item, num_pages))
            item_id = f"{name}#{start + 1}"
            sources.append(ItemSource(item_id, partial(_load, file, item_id, pages, question, dpi)))
    return sources


def _load(file: Path, item_id: str, pages: range, question: str, dpi: int) -> Item:
    images = []
    texts = []
    with _open(file) as document:
        for number in pages:
            where = f"{file}: page {number + 1}"
            with _page(document, number, where) as page:
                images.append(_render(page, dpi, where))
                text = _text(page)
                is_scan = not text and _has_picture(page)
                texts.append(None if is_scan or _has_fields(page) else text)
    messages = [Message("user", "<image>\n" * len(images) + question)]
    text = "\n\n".join(filter(None, texts))
    if text and None not in texts:  # else of some page nobody says what it shows
        messages.append(Message("assistant", text))
    return Item(item_id=item_id, messages=tuple(messages), images=tuple(images), domain=PDF)


@contextmanager
def _open(file: Path) -> "Iterator[PdfDocument]":
    try:
        from pypdfium2 import PdfDocument, PdfiumError
    except ImportError:
        raise DataError(
            f"{file}: PDF files need pypdfium2; install it with: pip install 'nvvl[pdf]'"
        ) from None
    try:
        document = PdfDocument(file)
        document.init_forms()  # else the fields of a form are rendered empty
    except PdfiumError as error:
        raise DataError(f"{file}: not a PDF file that can be opened ({error})") from None
    with closing(document):
        yield document


@contextmanager
def _page(document: "PdfDocument", number: int, where: str) -> "Iterator[PdfPage]":
    from pypdfium2 import PdfiumError

    try:
        page = document[number]
    except PdfiumError as error:
        raise DataError(f"{where}: cannot be read ({error})") from None
    with closing(page):
        yield page


def _render(page: "PdfPage", dpi: int, where: str) -> Image.Image:
    scale = dpi / _POINTS_PER_INCH
    width, height = (side * scale for side in page.get_size())
    if width * height > MAX_IMAGE_PIXELS or min(width, height) < 1:
        raise DataError(
            f"{where}: {width:.0f} x {height:.0f} pixels at {dpi} dpi; required at least 1 x 1 and "
            f"at most {MAX_IMAGE_PIXELS} in all"
        )
    # pypdfium2 takes fractions, its annotations say int
    with closing(page.render(scale=scale)) as bitmap:  # type: ignore[arg-type]
        # a copy, for the bitmap's memory is freed
        return to_rgb(bitmap.to_pil()).copy()


def _has_fields(page: "PdfPage") -> bool:
    from pypdfium2 import raw

    found = False
    for number in range(raw.FPDFPage_GetAnnotCount(page)):
        annotation = raw.FPDFPage_GetAnnot(page, number)
        found = found or raw.FPDFAnnot_GetSubtype(annotation) == raw.FPDF_ANNOT_WIDGET
        raw.FPDFPage_CloseAnnot(annotation)
    return found


def _has_picture(page: "PdfPage") -> bool:
    from pypdfium2 import raw

    return any(True for _ in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE]))


def _text(page: "PdfPage") -> str:
    with closing(page.get_textpage()) as layer:
        lines = layer.get_text_range().translate(_HYPHENS).splitlines()
    return "\n".join(line.rstrip() for line in lines).strip()
