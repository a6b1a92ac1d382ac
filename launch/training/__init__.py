"""The training program, in the order in which a run meets it.

``flags`` settles the ``options``; of these ``run`` makes the ``data``, the ``model``, one of the
``engines`` and the average, and takes up a ``checkpoint`` where there is one. The loop is
``train.py``. ``evaluation`` measures; ``display``, ``recording`` and ``plotting`` only show, and
``summary`` is what a finished run leaves to those who check what was made of it.
"""
