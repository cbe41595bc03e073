//! ferry-devices
