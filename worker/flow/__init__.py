"""The shell around the core: asyncio, and no vendor's library.

`lanes` owns the lanes of this worker and hands them what is delivered; `runner` drives one lane; `desk` makes its calls
on the avatar session; `keeper` keeps sessions alive and ends idle ones; `settler` carries out conclusions.
"""
