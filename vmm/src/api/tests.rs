//! The description of the control socket against what is served.

pub mod openapi;
