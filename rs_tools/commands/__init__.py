"""The commands of `rs-tools`, by group: `words`, `places` and `service`.

`options` holds what their command lines share, `asking` puts one question to many images, `showing` prints answers.
Modules here import what is heavy when a command runs: `rs-tools doctor` must work where an installation does not.
"""
