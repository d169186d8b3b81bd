"""Settings of all tests."""

from hypothesis import settings

# Time is not truth on a machine that others use too.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
