//! Template, tokenise, detokenise, stop strings.
#![forbid(unsafe_code)]
