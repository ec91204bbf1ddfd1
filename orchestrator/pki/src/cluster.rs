//! The files of one control plane, and what an agent is given of them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::authority::{self, Authority, Error, Identity, Usage};
use crate::kubeconfig;

/// The PKI folder of a control plane.
///
/// Files: `ca`, `etcd-ca` (authorities); `apiserver`, `apiserver-kubelet-client`, `etcd-server`, `etcd-client`
/// (leafs), `sa.key` (signs ServiceAccount tokens), `admin.conf` (kubeconfig).
pub struct ClusterPki {
    dir: PathBuf,
    ca: Authority,
    etcd_ca: Authority,
}

/// PEM texts and the kubeconfig of one agent.
pub struct AgentCredentials {
    /// kubeconfig of `system:node:NAME`.
    pub kubeconfig: String,
    pub ca: String,
    /// Serving certificate of the kubelet API.
    pub serving_certificate: String,
    pub serving_key: String,
    pub etcd_ca: String,
    pub etcd_certificate: String,
    pub etcd_key: String,
}

impl ClusterPki {
    /// Opens the folder, making what is missing. `addresses` and `names` are how the API server is reached.
    ///
    /// # Errors
    /// A file cannot be read, written or understood.
    pub fn ensure(dir: &Path, addresses: &[IpAddr], names: &[String]) -> Result<Self, Error> {
        let ca = Authority::load_or_create(dir, "ca", "orch-ca")?;
        let etcd_ca = Authority::load_or_create(dir, "etcd-ca", "orch-etcd-ca")?;
        let server = |user: &str, usage| Identity {
            user: user.to_owned(),
            group: None,
            dns_names: names.to_vec(),
            addresses: addresses.to_vec(),
            usage,
        };
        ca.ensure(dir, "apiserver", &server("kube-apiserver", Usage::Server))?;
        ca.ensure(
            dir,
            "apiserver-kubelet-client",
            &Identity::client("kube-apiserver-kubelet-client", Some("system:masters")),
        )?;
        etcd_ca.ensure(dir, "etcd-server", &server("etcd-server", Usage::Both))?;
        etcd_ca.ensure(dir, "etcd-client", &Identity::client("kube-apiserver", None))?;
        let token_key = dir.join("sa.key");
        if !token_key.exists() {
            let key = rcgen::KeyPair::generate().map_err(|source| Error::Make {
                subject: "service account tokens".to_owned(),
                source,
            })?;
            authority::write_private(&token_key, &key.serialize_pem())?;
        }
        Ok(Self { dir: dir.to_owned(), ca, etcd_ca })
    }

    /// One file of the folder as text.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self, name: &str) -> Result<String, Error> {
        authority::read(&self.dir.join(name))
    }

    /// Path of one file of the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The administrator's kubeconfig (`admin.conf`, mode 0600), made when absent or when `server` changed.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn ensure_admin_kubeconfig(&self, server: &str) -> Result<PathBuf, Error> {
        let path = self.dir.join("admin.conf");
        let current = std::fs::read_to_string(&path).unwrap_or_default();
        if !current.contains(&format!("\"{server}\"")) {
            let (certificate, key) =
                self.ca.issue(&Identity::client("kubernetes-admin", Some("system:masters")))?;
            let text = kubeconfig::kubeconfig(
                server,
                "kubernetes-admin",
                self.ca.certificate_pem(),
                &certificate,
                &key,
            );
            authority::write_private(&path, &text)?;
        }
        Ok(path)
    }

    /// New credentials for the agent of `node`.
    ///
    /// # Errors
    /// A name does not fit into a certificate.
    pub fn agent_credentials(
        &self,
        node: &str,
        addresses: &[IpAddr],
        server: &str,
    ) -> Result<AgentCredentials, Error> {
        let user = format!("system:node:{node}");
        let (certificate, key) = self.ca.issue(&Identity::client(&user, Some("system:nodes")))?;
        let (serving_certificate, serving_key) = self.ca.issue(&Identity {
            user: user.clone(),
            group: Some("system:nodes".to_owned()),
            dns_names: vec![node.to_owned()],
            addresses: addresses.to_vec(),
            usage: Usage::Server,
        })?;
        let (etcd_certificate, etcd_key) =
            self.etcd_ca.issue(&Identity::client(format!("netagent:{node}"), None))?;
        Ok(AgentCredentials {
            kubeconfig: kubeconfig::kubeconfig(
                server,
                &user,
                self.ca.certificate_pem(),
                &certificate,
                &key,
            ),
            ca: self.ca.certificate_pem().to_owned(),
            serving_certificate,
            serving_key,
            etcd_ca: self.etcd_ca.certificate_pem().to_owned(),
            etcd_certificate,
            etcd_key,
        })
    }
}

impl AgentCredentials {
    /// Writes the files an agent reads into `dir`: `kubelet.conf`, `ca.crt`, `kubelet.{crt,key}`,
    /// `etcd-ca.crt`, `etcd-client.{crt,key}`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), Error> {
        for (name, text) in [
            ("kubelet.conf", &self.kubeconfig),
            ("kubelet.key", &self.serving_key),
            ("etcd-client.key", &self.etcd_key),
        ] {
            authority::write_private(&dir.join(name), text)?;
        }
        for (name, text) in [
            ("ca.crt", &self.ca),
            ("kubelet.crt", &self.serving_certificate),
            ("etcd-ca.crt", &self.etcd_ca),
            ("etcd-client.crt", &self.etcd_certificate),
        ] {
            authority::write_public(&dir.join(name), text)?;
        }
        Ok(())
    }
}
