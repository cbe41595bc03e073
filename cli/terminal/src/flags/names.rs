//! Values by the names that they have in JSON, so that there is one list of names.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::de::value::{Error, StrDeserializer};
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::forward_to_deserialize_any;

/// A flag's parser for the unit variants of an enum; `--help` and errors list their names.
pub fn choice<T>() -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names::<T>()).try_map(|name| {
        T::deserialize(StrDeserializer::<Error>::new(&name)).map_err(|e| e.to_string())
    })
}

/// The names of an enum's variants, as its `Deserialize` asks for them.
fn names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut found: &'static [&'static str] = &[];
    // The listener answers every question with an error: only the question matters.
    let _ = T::deserialize(Listener(&mut found));
    found
}

struct Listener<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Listener<'_> {
    type Error = Error;

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        *self.0 = variants;
        self.deserialize_any(visitor)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(serde::de::Error::custom("there is no value"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::options::{Compress, PolicyKind};
    use ferry_migration::order::PushOrder;

    #[test]
    fn the_names_are_those_of_the_json() {
        let policies: Vec<_> = PolicyKind::ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(names::<PolicyKind>(), policies);
        assert_eq!(names::<PushOrder>(), ["demand", "flush", "bubble"]);
        assert!(names::<Compress>().contains(&"zstd"));
        assert!(names::<u32>().is_empty());
    }
}
