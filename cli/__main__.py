"""python -m cbn_convert.cli"""

from .main import app

app(prog_name="cbn")
