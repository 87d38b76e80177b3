from hypothesis import settings

# The first example of a property may compile a kernel, which takes seconds: no deadline on one example.
settings.register_profile("kernels", parent=settings(), deadline=None)
settings.load_profile("kernels")
