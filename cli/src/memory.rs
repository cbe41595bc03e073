//! `--memory SIZE[,max=MAX]`: what a guest begins with, and what it can grow to.

use ferry_terminal::units::size;
use std::str::FromStr;

/// `--memory`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that the guest begins with.
    pub size: u64,
    /// Bytes that it can grow to, if that was said.
    pub max: Option<u64>,
}

impl Memory {
    /// Its RAM in bytes: all that it can ever have.
    pub fn ram(self) -> u64 {
        self.max.unwrap_or(self.size)
    }
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((first, max)) = text.split_once(',') else {
            let size = size(text)?;
            return Ok(Self { size, max: None });
        };
        let max = max
            .strip_prefix("max=")
            .ok_or("memory is a size, and max=SIZE if it can grow, such as 512M,max=1G")?;
        let (size, max) = (size(first)?, size(max)?);
        if max < size {
            return Err("max= is less than the guest begins with; give more".into());
        }
        Ok(Self {
            size,
            max: Some(max),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_told() {
        let memory = |text: &str| {
            let memory = text.parse::<Memory>();
            memory.map(|memory| (memory.size >> 20, memory.ram() >> 20, memory.max.is_some()))
        };
        assert_eq!(memory("512M"), Ok((512, 512, false)));
        assert_eq!(memory("512M,max=1G"), Ok((512, 1024, true)));
        assert_eq!(memory("1G,max=1G"), Ok((1024, 1024, true)));
        for bad in [
            "",
            "512M,",
            "512M,1G",
            "512M,max=",
            "512M,max=1G,x=1",
            "1G,max=512M",
        ] {
            assert!(memory(bad).is_err(), "{bad}");
        }
    }
}
