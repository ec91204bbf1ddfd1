//! Label and field selectors (API concepts, "Labels and Selectors", "Field Selectors").

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::names;

/// A text that is no selector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unable to parse requirement: {0}")]
pub struct SelectorError(pub String);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Operator {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    GreaterThan(i64),
    LessThan(i64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
}

impl Requirement {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::Absent => value.is_none(),
            Operator::GreaterThan(limit) => number(value).is_some_and(|number| number > *limit),
            Operator::LessThan(limit) => number(value).is_some_and(|number| number < *limit),
        }
    }
}

fn number(value: Option<&String>) -> Option<i64> {
    value?.parse().ok()
}

/// A label selector: all requirements must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selector {
    requirements: Vec<Requirement>,
    nothing: bool,
}

impl Selector {
    /// Matches everything.
    #[must_use]
    pub fn everything() -> Self {
        Self::default()
    }

    /// Matches nothing.
    #[must_use]
    pub fn nothing() -> Self {
        Self { requirements: Vec::new(), nothing: true }
    }

    /// Every label as given.
    #[must_use]
    pub fn from_labels(labels: &BTreeMap<String, String>) -> Self {
        let requirements = labels
            .iter()
            .map(|(key, value)| Requirement {
                key: key.clone(),
                operator: Operator::In(vec![value.clone()]),
            })
            .collect();
        Self { requirements, nothing: false }
    }

    /// # Errors
    /// An operator is unknown or has the wrong number of values.
    pub fn from_label_selector(selector: &LabelSelector) -> Result<Self, SelectorError> {
        let mut all = Self::from_labels(selector.match_labels.as_ref().unwrap_or(&BTreeMap::new()));
        for expression in selector.match_expressions.iter().flatten() {
            all.require(
                &expression.key,
                &expression.operator,
                expression.values.as_deref().unwrap_or_default(),
            )?;
        }
        Ok(all)
    }

    /// Adds a requirement by its API operator: In, `NotIn`, Exists, `DoesNotExist`, Gt, Lt.
    ///
    /// # Errors
    /// The operator is unknown or has the wrong number of values.
    pub fn require(
        &mut self,
        key: &str,
        operator: &str,
        values: &[String],
    ) -> Result<(), SelectorError> {
        let one_number = || -> Result<i64, SelectorError> {
            match values {
                [value] => {
                    value.parse().map_err(|_| SelectorError(format!("{value:?} is no integer")))
                }
                _ => Err(SelectorError(format!("{operator} takes one value"))),
            }
        };
        let operator = match operator {
            "In" | "NotIn" if values.is_empty() => {
                return Err(SelectorError(format!(
                    "for {operator:?} operator, values set can't be empty"
                )));
            }
            "In" => Operator::In(values.to_vec()),
            "NotIn" => Operator::NotIn(values.to_vec()),
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::Absent,
            "Gt" => Operator::GreaterThan(one_number()?),
            "Lt" => Operator::LessThan(one_number()?),
            other => {
                return Err(SelectorError(format!(
                    "{other:?} is not a valid label selector operator"
                )));
            }
        };
        self.requirements.push(Requirement { key: key.to_owned(), operator });
        Ok(())
    }

    /// Parses the text form: `a=b,c!=d,e in (f,g),h notin (i),j,!k,l>1`.
    ///
    /// # Errors
    /// The text is no selector.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    continue;
                }
                return Err(SelectorError(format!("found '', expected: identifier in {text:?}")));
            }
            let requirement = parse_requirement(part)?;
            names::is_qualified_name(&requirement.key).map_err(|why| {
                SelectorError(format!("invalid label key {:?}: {why}", requirement.key))
            })?;
            if let Operator::In(values) | Operator::NotIn(values) = &requirement.operator {
                for value in values {
                    names::is_label_value(value).map_err(|why| {
                        SelectorError(format!("invalid label value {value:?}: {why}"))
                    })?;
                }
            }
            requirements.push(requirement);
        }
        Ok(Self { requirements, nothing: false })
    }

    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.nothing && self.requirements.iter().all(|requirement| requirement.matches(labels))
    }

    #[must_use]
    pub fn is_everything(&self) -> bool {
        !self.nothing && self.requirements.is_empty()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Requirement { key, operator }) in self.requirements.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            match operator {
                Operator::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0])?,
                Operator::In(values) => write!(f, "{key} in ({})", values.join(","))?,
                Operator::NotIn(values) if values.len() == 1 => write!(f, "{key}!={}", values[0])?,
                Operator::NotIn(values) => write!(f, "{key} notin ({})", values.join(","))?,
                Operator::Exists => f.write_str(key)?,
                Operator::Absent => write!(f, "!{key}")?,
                Operator::GreaterThan(limit) => write!(f, "{key}>{limit}")?,
                Operator::LessThan(limit) => write!(f, "{key}<{limit}")?,
            }
        }
        Ok(())
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0_i32, 0);
    for (index, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn parse_requirement(part: &str) -> Result<Requirement, SelectorError> {
    let make = |key: &str, operator| Ok(Requirement { key: key.trim().to_owned(), operator });
    if let Some(key) = part.strip_prefix('!') {
        return make(key, Operator::Absent);
    }
    if let Some((head, values)) = part.strip_suffix(')').and_then(|rest| rest.split_once('(')) {
        let mut words = head.split_whitespace();
        let values: Vec<String> = values.split(',').map(|value| value.trim().to_owned()).collect();
        return match (words.next(), words.next(), words.next()) {
            (Some(key), Some("in"), None) => make(key, Operator::In(values)),
            (Some(key), Some("notin"), None) => make(key, Operator::NotIn(values)),
            _ => Err(SelectorError(format!(
                "{part:?}: expected KEY in (VALUES) or KEY notin (VALUES)"
            ))),
        };
    }
    if let Some((key, value)) = part.split_once("!=") {
        return make(key, Operator::NotIn(vec![value.trim().to_owned()]));
    }
    if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return make(key, Operator::In(vec![value.trim().to_owned()]));
    }
    let limit = |value: &str| {
        value.trim().parse().map_err(|_| {
            SelectorError(format!("{part:?}: for '>' and '<', the value must be an integer"))
        })
    };
    if let Some((key, value)) = part.split_once('>') {
        return make(key, Operator::GreaterThan(limit(value)?));
    }
    if let Some((key, value)) = part.split_once('<') {
        return make(key, Operator::LessThan(limit(value)?));
    }
    make(part, Operator::Exists)
}

/// One requirement on a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldRequirement {
    pub field: String,
    pub negated: bool,
    pub value: String,
}

/// A field selector: `metadata.name=a,status.phase!=Running`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FieldSelector(Vec<FieldRequirement>);

impl FieldSelector {
    /// # Errors
    /// The text is no selector.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut all = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (field, value, negated) = if let Some((field, value)) = part.split_once("!=") {
                (field, value, true)
            } else if let Some((field, value)) =
                part.split_once("==").or_else(|| part.split_once('='))
            {
                (field, value, false)
            } else {
                return Err(SelectorError(format!(
                    "invalid selector: {part:?}; can't understand it, expected FIELD=VALUE or FIELD!=VALUE"
                )));
            };
            all.push(FieldRequirement {
                field: field.to_owned(),
                negated,
                value: value.to_owned(),
            });
        }
        Ok(Self(all))
    }

    #[must_use]
    pub fn requirements(&self) -> &[FieldRequirement] {
        &self.0
    }

    /// Whether all requirements hold; an unknown field has the empty value.
    pub fn matches<'a>(&self, value_of: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.0.iter().all(|requirement| {
            (value_of(&requirement.field).unwrap_or_default() == requirement.value)
                != requirement.negated
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn the_text_form_means_what_it_says() {
        let web = labels(&[("app", "web"), ("tier", "front"), ("n", "5")]);
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier!=back", true),
            ("app in (web, db)", true),
            ("app notin (web)", false),
            ("absent notin (x)", true),
            ("app", true),
            ("!app", false),
            ("n>4,n<6", true),
            ("n>5", false),
            ("app=", false),
        ] {
            assert_eq!(Selector::parse(text).expect(text).matches(&web), expected, "{text}");
        }
        for text in ["a in b", "=x", "a=b,,c", "n>x", "a=b c", "-a=b"] {
            assert!(Selector::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_text_form_can_be_read_back() {
        let text = "a=b,c!=d,e in (f,g),h notin (i,j),k,!l,m>1";
        let selector = Selector::parse(text).expect("selector");
        assert_eq!(Selector::parse(&selector.to_string()).expect("again"), selector);
    }

    #[test]
    fn nothing_and_everything_differ() {
        assert!(!Selector::nothing().matches(&BTreeMap::new()));
        assert!(Selector::everything().matches(&BTreeMap::new()));
    }

    #[test]
    fn field_selectors_compare_texts() {
        let selector =
            FieldSelector::parse("metadata.name=a,status.phase!=Running").expect("selector");
        assert!(selector.matches(|field| (field == "metadata.name").then_some("a")));
        assert!(!selector.matches(|_| Some("Running")));
        assert!(FieldSelector::parse("nonsense").is_err());
    }
}
