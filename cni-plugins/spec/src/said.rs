//! How configurations say things: nothing as `null`, and one thing in several places.

use serde::{Deserialize, Deserializer};

use crate::Error;

/// For `deserialize_with`: Go writes an empty list, object or pointer as `null`.
///
/// # Errors
/// What the type makes of anything else.
pub fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A place where a value may be asked for: its name for people, what it says, and the code of an error about it.
pub type Place<'a> = (&'a str, Option<&'a str>, u32);

/// The value of the first place that says one; an empty text says nothing.
///
/// # Errors
/// If `parse` does not take it: `wanted` says what it has to be.
pub fn first_said<T>(
    places: &[Place<'_>],
    wanted: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>, Error> {
    let said = places.iter().find_map(|(place, text, code)| {
        text.filter(|text| !text.is_empty()).map(|text| (place, text, *code))
    });
    let Some((place, text, code)) = said else { return Ok(None) };
    let wrong = || Error::new(code, format!("{place} is \"{text}\" and has to be {wanted}"));
    parse(text).map(Some).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code;

    #[test]
    fn the_first_place_that_says_something_counts_and_is_named() {
        let number = |first: Option<&str>, second| {
            let places = [
                ("\"first\"", first, code::INVALID_CONFIG),
                ("SECOND", second, code::INVALID_ENVIRONMENT),
            ];
            first_said(&places, "a number", |text| text.parse::<u8>().ok())
        };
        assert_eq!(number(Some("1"), Some("2")), Ok(Some(1)));
        assert_eq!(number(Some(""), Some("2")), Ok(Some(2)));
        assert_eq!(number(None, None), Ok(None));
        let error = number(None, Some("x")).expect_err("no number");
        assert_eq!(error.code, code::INVALID_ENVIRONMENT);
        assert_eq!(error.msg, "SECOND is \"x\" and has to be a number");
        assert!(number(Some("x"), Some("2")).is_err(), "a wrong one is not passed over");
    }
}
