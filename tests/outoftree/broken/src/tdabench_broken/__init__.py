"""A plugin that cannot be imported: tdabench must warn, and go on without it."""

import a_package_that_nobody_has  # noqa: F401
