"""For `FERRUM_IMPORTS`: this worker sends every message twice."""

import twice

twice.install()
