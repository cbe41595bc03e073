//! Values of flags that more than one command takes.

use serde::de::DeserializeOwned;

/// A value by its name in the options' own JSON, so that there is one list of names.
///
/// # Errors
/// A sentence with the known names.
pub fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(serde_json::Value::String(text.to_owned()))
        .map_err(|e| e.to_string().replace('`', "'"))
}

/// Yes or no, or neither.
#[derive(Clone, Copy, Debug)]
pub struct Asked(pub Option<bool>);

/// `on`, `off`, or `auto`, which leaves the choice to the policy.
///
/// # Errors
/// A sentence with these three.
pub fn asked(text: &str) -> Result<Asked, String> {
    match text {
        "auto" => Ok(Asked(None)),
        "on" => Ok(Asked(Some(true))),
        "off" => Ok(Asked(Some(false))),
        _ => Err("give auto, on or off".into()),
    }
}
